"""A recorded or made-up trace through the policy, without a model."""
