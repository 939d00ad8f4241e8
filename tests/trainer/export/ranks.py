"""What ranks run in the export's tests; a separate module, because ranks import it."""

from pathlib import Path

import numpy as np
import torch

from trainer.engine.gangs import LENGTH

VOCAB = 400
PROMPTS = [[1, 2, 3], [7, 300, 12, 9, 250], [399]]
CONTINUATION = 32


def ask_megatron(rank: int, world: int, trained: Path) -> tuple[list[np.ndarray], list[list[int]]]:
    """Logits of the prompts, and greedy continuations by whole forward passes."""
    from headrace_api.parallelism import Layout
    from headrace_trainer.engine.model.loading import load_model
    from headrace_trainer.engine.parallel import join_gang
    from headrace_trainer.formats.model_card import read_card

    card = read_card(trained)
    with join_gang(Layout(tensor=world, pipeline=1, data=1), rank=rank, local_rank=rank, local_world=world) as ranks:
        model = load_model(card, trained, ranks)

        def logits(ids: list[int]) -> torch.Tensor:
            tokens = torch.tensor([ids])
            with torch.no_grad():
                return model(tokens, torch.arange(len(ids))[None], None)[0, :, : card.vocab_size]

        found = [logits(p).numpy() for p in PROMPTS]
        continued = []
        for prompt in PROMPTS:
            ids = list(prompt)
            for _ in range(CONTINUATION):
                ids.append(int(logits(ids)[-1].argmax()))
            continued.append(ids)
    return found, continued


def megatron_loss(rank: int, world: int, trained: Path) -> float:
    """Mean token loss over fixed windows, by the evaluate stage's own functions."""
    from headrace_api.parallelism import Layout
    from headrace_trainer.engine.model.loading import load_model
    from headrace_trainer.engine.parallel import join_gang
    from headrace_trainer.formats.model_card import read_card
    from headrace_trainer.stages.evaluate.losses import token_losses

    card = read_card(trained)
    with join_gang(Layout(tensor=1, pipeline=1, data=1), rank=rank) as ranks:
        model = load_model(card, trained, ranks)
        losses = token_losses(model, Windows(), gang=ranks, num_windows=20, tell=lambda done: None)
    return float(losses.mean(dtype=np.float64))


class Windows:
    """Samples for a loss: any tokens do."""

    def sample(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(0, VOCAB, LENGTH + 1)
