"""The instance's part in self-training: recorded states go to a learner, and its checkpoints come back.

The process of the engine core, which owns the control channel, and the worker process, which records and predicts, meet
in the files of one folder (`folder.py`). Nothing here is in the way of a step.
"""
