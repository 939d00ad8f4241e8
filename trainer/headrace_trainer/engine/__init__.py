"""Megatron-core, shared by every stage that computes gradients or losses: device, parallel, model, checkpoint, loop."""
