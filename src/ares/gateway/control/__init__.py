"""The loops that ask the policy, and what they show it."""
