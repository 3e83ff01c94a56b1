"""The learner: it takes recorded states from instances, trains predictors, tests them, and sends out the better one."""
