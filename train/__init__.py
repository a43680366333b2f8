"""Training: the Storybook world, the base model, the encoder, the adapters, the judge and the evaluation."""
