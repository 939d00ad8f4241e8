"""The Llama family on Megatron-core: ``card`` describes a trained model, ``build`` makes one for this rank's place."""
