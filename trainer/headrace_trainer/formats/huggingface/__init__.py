"""Models as Hugging Face keeps them: ``configs`` describes one, ``names`` maps its tensors to those of checkpoints and back,
``files`` reads its folder.

The families share a skeleton; ``headrace_api.model.Family`` says what differs.
"""
