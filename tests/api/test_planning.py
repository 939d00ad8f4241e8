"""Memory of a rank against figures worked out by hand. tests/trainer compares it with real tensors."""

import copy
from typing import Any

import pytest

from builders import manifest
from headrace_api.errors import parse_run
from headrace_api.model import PRESETS
from headrace_api.parallelism import Layout
from headrace_api.planning import Estimate, estimate_training
from headrace_api.planning.fit import device_errors, least_estimate, vocab_size
from headrace_api.planning.memory import Batches, Memory, fullest_rank, num_stage_parameters
from headrace_api.run import TrainingRun
from headrace_api.stages import Lora, LoraTarget
from headrace_api.stages.training import Precision

LLAMA_7B = PRESETS["llama-7b"]
ONE = Layout(tensor=1, pipeline=1, data=1)
SHARDED = Layout(tensor=4, pipeline=2, data=8)
VOCAB = 32_000  # padded to 32,768

# A layer of llama-7b: 4 x 4096^2 = 67,108,864 of attention, 3 x 4096 x 11008 = 135,266,304 of feed-forward, two norms.
WHOLE = 32 * (67_108_864 + 135_266_304 + 8_192) + 2 * 134_217_728 + 4_096
# Half of the layers, a quarter of each matrix, a quarter of one table; the last stage has the final norm.
FIRST_OF_TWO = 16 * (16_777_216 + 33_816_576 + 8_192) + 33_554_432
LAST_OF_TWO = FIRST_OF_TWO + 4_096


def memory(
    axes: Layout,
    *,
    precision: Precision = Precision.BF16,
    num_micro_batches: int = 1,
    lora: Lora | None = None,
    **kwargs: bool,
) -> Memory:
    batches = Batches(sequence_length=2048, micro_batch_size=1, num_micro_batches=num_micro_batches)
    kernels = {"fused": True, "sequence_parallel": True} | kwargs
    return fullest_rank(LLAMA_7B, axes, vocab_size=VOCAB, precision=precision, batches=batches, lora=lora, **kernels)


def test_parameters_of_a_rank() -> None:
    assert WHOLE == 6_744_707_072
    assert num_stage_parameters(LLAMA_7B, ONE, stage=0, vocab_size=VOCAB) == WHOLE
    assert num_stage_parameters(LLAMA_7B, SHARDED, stage=0, vocab_size=VOCAB) == FIRST_OF_TWO == 843_186_176
    assert num_stage_parameters(LLAMA_7B, SHARDED, stage=1, vocab_size=VOCAB) == LAST_OF_TWO


@pytest.mark.parametrize(("tied", "first", "middle", "last"), [(False, 1, 0, 1), (True, 1, 0, 1)])
def test_stages_between_the_ends_have_no_table(tied: bool, first: int, middle: int, last: int) -> None:
    arch = LLAMA_7B.model_copy(update={"tie_embeddings": tied})
    axes = Layout(tensor=1, pipeline=4, data=1)
    layers = 8 * (67_108_864 + 135_266_304 + 8_192)
    found = [num_stage_parameters(arch, axes, stage=s, vocab_size=VOCAB) - layers for s in range(4)]
    assert found == [first * 134_217_728, middle, middle, last * 134_217_728 + 4_096]


def test_one_rank_keeps_a_tied_table_once() -> None:
    tied = LLAMA_7B.model_copy(update={"tie_embeddings": True})
    assert num_stage_parameters(tied, ONE, stage=0, vocab_size=VOCAB) == WHOLE - 134_217_728


@pytest.mark.parametrize(
    ("axes", "precision", "weights", "gradients", "optimizer"),
    [
        (ONE, Precision.FP32, 26_978_828_288, 26_978_828_288, 53_957_656_576),  # 4, 4 and 8 bytes a parameter
        (ONE, Precision.BF16, 13_489_414_144, 26_978_828_288, 80_936_484_864),  # 2, 4 and 4 + 8
        (Layout(tensor=1, pipeline=1, data=64), Precision.BF16, 13_489_414_144, 26_978_828_288, 1_264_632_576),
        (SHARDED, Precision.BF16, 1_686_372_352, 3_372_744_704, 1_264_779_264),  # the first stage: it saves more
        (SHARDED, Precision.FP8, 1_686_372_352, 3_372_744_704, 1_264_779_264),
    ],
)
def test_state_of_the_fullest_rank(
    axes: Layout, precision: Precision, weights: int, gradients: int, optimizer: int
) -> None:
    found = memory(axes, precision=precision, num_micro_batches=8)
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, optimizer)
    assert found.state == weights + gradients + optimizer


def test_activations_of_one_rank() -> None:
    # A token in a layer, in bf16: two norms of (x, its norm), q k v as projected, q k with positions, the output, 3 x FFN.
    layer = 2 * (4 * 4096 + 3 * 4096 + 2 * 4096 + 4096 + 3 * 11008)
    loss = 2 * 2 * 4096 + 4 * 32_768
    assert memory(ONE).activations == 2048 * (32 * layer + loss)


@pytest.mark.parametrize(
    ("precision", "norm", "width"), [(Precision.FP32, 12 * 4096, 4), (Precision.BF16, 10 * 4096, 2)]
)
def test_plain_kernels_keep_more(precision: Precision, norm: int, width: int) -> None:
    # Norms keep their input in fp32, what they normalized, and their output; SwiGLU keeps two tensors more.
    layer = 2 * norm + width * (4096 + 2 * 4096 + 2 * 4096 + 4096 + 5 * 11008)
    loss = norm + 4 * 32_768
    assert memory(ONE, precision=precision, fused=False).activations == 2048 * (32 * layer + loss)


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("axes", [ONE, SHARDED])
@pytest.mark.parametrize("lora", [None, Lora()])
def test_bytes_are_whole(axes: Layout, precision: Precision, lora: Lora | None) -> None:
    found = memory(axes, precision=precision, num_micro_batches=8, lora=lora)
    assert [type(n) for n in (found.weights, found.gradients, found.optimizer, found.activations)] == [int] * 4


def test_tied_embeddings_are_counted_once() -> None:
    tied = LLAMA_7B.model_copy(update={"tie_embeddings": True})
    assert LLAMA_7B.num_parameters(VOCAB) - tied.num_parameters(VOCAB) == VOCAB * 4096


def test_the_first_of_two_stages_holds_two_micro_batches() -> None:
    layer = 2 * (4 * 4096 + 3 * 4096 + 2 * 4096 + 4096 + 3 * 11008) // 4
    assert memory(SHARDED, num_micro_batches=8).activations == 2 * 2048 * 16 * layer


def test_fp8_keeps_two_more_bytes_a_weight() -> None:
    extra = memory(ONE, precision=Precision.FP8).activations - memory(ONE).activations
    assert extra == 2 * WHOLE


def test_the_state_of_an_adapter_is_cut_as_its_matrices_are() -> None:
    # On each of 4 x 2 ranks, 16 layers of rank 8: 4096 -> a quarter of 3 x 4096, and a quarter of 4096 -> 4096.
    added = 16 * 8 * ((4096 + 3072) + (1024 + 4096))
    found = memory(SHARDED, lora=Lora(rank=8, targets=[LoraTarget.QKV, LoraTarget.PROJ]))
    assert found.weights == 2 * (LAST_OF_TWO + added)
    assert (found.gradients, found.optimizer) == (4 * added, 12 * added // 8)


# Bytes that each token leaves in a layer of llama-7b in bf16, with an adapter of rank 32. Always: q k v as projected, q k
# with positions, the output of attention, and gate and up.
ALWAYS = 2 * (3 * 4096 + 2 * 4096 + 4096 + 2 * 11008)
NORM_IN, NORM_OUT, FC2_IN, FACTOR = 2 * 4096, 2 * 4096, 2 * 11008, 2 * 32
QKV, PROJ, FC1, FC2 = LoraTarget
TENSOR = Layout(tensor=4, pipeline=1, data=1)
PLAIN = {"fused": False}
WHOLE_SEQUENCE = {"sequence_parallel": False}
# Norms leave their outputs only to matrices with an update, and so does SwiGLU; so do the factors' middles.
ADAPTED: list[tuple[str, list[LoraTarget], Layout, dict[str, bool], int, int]] = [
    ("all", [QKV, PROJ, FC1, FC2], ONE, {}, 2 * (NORM_IN + NORM_OUT) + ALWAYS + FC2_IN + 4 * FACTOR, NORM_IN),
    ("qkv", [QKV], ONE, {}, 2 * NORM_IN + NORM_OUT + ALWAYS + FACTOR, NORM_IN),
    ("proj", [PROJ], ONE, {}, 2 * NORM_IN + ALWAYS + FACTOR, NORM_IN),
    ("fc1", [FC1], ONE, {}, 2 * NORM_IN + NORM_OUT + ALWAYS + FACTOR, NORM_IN),
    ("fc2", [FC2], ONE, {}, 2 * NORM_IN + ALWAYS + FC2_IN + FACTOR, NORM_IN),
    # Unfused, in fp32: a frozen norm's input, but not the normalized values; SiLU's input and output.
    ("plain kernels", [QKV], ONE, PLAIN, 2 * 2 * NORM_IN + NORM_OUT + ALWAYS + 2 * FC2_IN + FACTOR, 2 * NORM_IN),
    # Of four ranks, each has a quarter. Between the factors of qkv and fc1, it has everything; between those of proj and
    # fc2, whose sums the ranks add up, a quarter of the tokens, or everything without sequence parallelism.
    ("in four", [QKV, PROJ, FC2], TENSOR, {}, (2 * NORM_IN + NORM_OUT + ALWAYS + FC2_IN + 2 * FACTOR) // 4 + FACTOR, NORM_IN // 4),
    ("in four, whole sequences", [PROJ, FC2], TENSOR, WHOLE_SEQUENCE, 2 * NORM_IN + (ALWAYS + FC2_IN) // 4 + 2 * FACTOR, NORM_IN),
]  # fmt: skip


@pytest.mark.parametrize(
    ("targets", "axes", "kernels", "layer", "norm"), [row[1:] for row in ADAPTED], ids=[row[0] for row in ADAPTED]
)
def test_activations_with_an_adapter(
    targets: list[LoraTarget], axes: Layout, kernels: dict[str, bool], layer: int, norm: int
) -> None:
    found = memory(axes, lora=Lora(rank=32, targets=targets), **kernels)
    loss = norm + 4 * 32_768 // axes.tensor  # after the last norm, whose output the frozen table does not keep
    assert found.activations == 2048 * (32 * layer + loss)


def test_tensor_ranks_share_norms_only_with_sequence_parallelism() -> None:
    axes = Layout(tensor=4, pipeline=1, data=1)
    more = memory(axes, sequence_parallel=False).activations - memory(axes).activations
    assert more == 2048 * (32 * 2 + 1) * (2 * 2 * 4096 * 3 // 4)


def seven_billion(*, compute: dict[str, Any], **pretrain: Any) -> TrainingRun:
    """A run that trains llama-7b in bf16 on one rank, unless it says otherwise."""
    value = manifest()
    base = value["spec"]["stages"][3]
    base["compute"] = compute
    base["pretrain"] |= {"model": {"preset": "llama-7b"}, "precision": "bf16", "parallelism": {}} | pretrain
    value["spec"]["stages"][1]["tokenizer"]["vocabSize"] = VOCAB
    return parse_run(value)


def test_the_estimate_of_a_stage_is_that_of_its_fullest_rank() -> None:
    stage = seven_billion(compute={"nodes": 8, "gpusPerNode": 8}, parallelism={"tensor": 4, "pipeline": 2}).spec.stages[
        3
    ]
    assert stage.pretrain is not None
    estimate = estimate_training(
        stage.pretrain, LLAMA_7B, num_ranks=stage.compute.world, vocab_size=VOCAB, on_gpus=True
    )
    assert estimate.parameters == 6_738_415_616  # as published, with the vocabulary unpadded
    assert estimate.data_ranks == 8
    assert estimate.tokens_per_parameter == 489 * 2048 / 6_738_415_616  # 1M tokens in whole steps
    assert type(estimate.activation_bytes_per_rank) is int
    assert estimate.state_bytes_per_rank == 6 * FIRST_OF_TWO + 12 * FIRST_OF_TWO // 8 == 6_323_896_320
    layer = 2 * (4 * 4096 + 3 * 4096 + 2 * 4096 + 4096 + 3 * 11008) // 4
    assert estimate.activation_bytes_per_rank == 2 * 128 * 16 * layer  # two micro-batches of 128 tokens


def test_fewer_micro_batches_than_stages_are_in_flight_at_once() -> None:
    parallelism = {"tensor": 4, "pipeline": 2}
    run = seven_billion(compute={"nodes": 8, "gpusPerNode": 8}, parallelism=parallelism, microBatchSize=2)
    pretrain = run.spec.stages[3].pretrain
    assert pretrain is not None
    estimate = estimate_training(pretrain, LLAMA_7B, num_ranks=64, vocab_size=VOCAB, on_gpus=True)
    layer = 2 * (4 * 4096 + 3 * 4096 + 2 * 4096 + 4096 + 3 * 11008) // 4
    loss = (2 * 2 * 4096 + 4 * 32_768) // 4
    assert estimate.activation_bytes_per_rank == 2 * 128 * (16 * layer + loss)  # the last stage: one of two samples


def test_the_first_of_four_stages_holds_the_two_micro_batches_that_there_are() -> None:
    run = seven_billion(
        compute={"nodes": 8, "gpusPerNode": 8}, parallelism={"tensor": 4, "pipeline": 4}, microBatchSize=2
    )
    pretrain = run.spec.stages[3].pretrain
    assert pretrain is not None
    estimate = estimate_training(pretrain, LLAMA_7B, num_ranks=64, vocab_size=VOCAB, on_gpus=True)
    layer = 2 * (4 * 4096 + 3 * 4096 + 2 * 4096 + 4096 + 3 * 11008) // 4
    assert estimate.activation_bytes_per_rank == 2 * 2 * 128 * 8 * layer
    assert type(estimate.activation_bytes_per_rank) is int


@pytest.mark.parametrize(
    ("compute", "gpu_memory", "refused"),
    [
        ({"gpusPerNode": 1}, None, ""),
        ({"gpusPerNode": 1}, 121_404_727_296, ""),  # 18 bytes for each of 6,744,707,072
        ({"gpusPerNode": 1}, 121_404_727_295, "pretrain.parallelism"),
        ({"gpusPerNode": 1, "memory": "1Gi"}, None, ""),
        ({"memory": 121_404_727_296}, 1, ""),
        ({"memory": 121_404_727_295}, None, "compute.memory"),
        ({"ranksPerNode": 4, "memory": "200G"}, None, "compute.memory"),  # 6 bytes each, and 12 in four: 4 x 60.7 GB
        ({"nodes": 4, "memory": "200G"}, None, ""),
    ],
)
def test_a_state_that_is_larger_than_its_memory_is_refused(
    compute: dict[str, Any], gpu_memory: int | None, refused: str
) -> None:
    errors = device_errors(seven_billion(compute=compute), gpu_memory=gpu_memory)
    assert [e.field for e in errors] == ([f"spec.stages[3].{refused}"] if refused else [])


def test_a_refusal_says_what_is_needed_what_there_is_and_what_to_do() -> None:
    on_gpus = seven_billion(compute={"gpusPerNode": 1})
    (error,) = device_errors(on_gpus, gpu_memory=80 * 10**9)
    split, smaller = "split the model over more ranks (parallelism), add data ranks", "or choose a smaller model"
    needs = "weights, gradients and optimizer state take 121.4 GB per rank, but a GPU has 80 GB"
    assert (error.value, error.remedy) == (None, f"{needs}; {split}, {smaller}")
    further = tuned(compute={"gpusPerNode": 1})
    (error,) = [e for e in device_errors(further, gpu_memory=80 * 10**9) if "stages[4]" in e.field]
    assert error.remedy == f"{needs}; {split}, train only an adapter (adapter.lora), {smaller}"
    on_processors = seven_billion(compute={"ranksPerNode": 2, "memory": "100G"})
    (error,) = device_errors(on_processors, gpu_memory=None)
    assert "take 80.9 GB per rank" in error.remedy and "its 2 ranks share 100 GB" in error.remedy


def test_an_imported_vocabulary_is_not_guessed() -> None:
    run = seven_billion(compute={})
    pretrain = run.spec.stages[3].pretrain
    assert pretrain is not None
    assert vocab_size(run, pretrain) == VOCAB
    value = run.dump()
    value["spec"]["stages"][1]["tokenizer"] = {"import": {"uri": "/gpt2"}}
    assert vocab_size(parse_run(value), pretrain) is None


def test_the_vocabulary_is_that_of_the_shards_that_are_read() -> None:
    value = manifest()
    other = copy.deepcopy(value["spec"]["stages"][1:3])
    other[0] |= {"name": "tok-2"}
    other[0]["tokenizer"]["vocabSize"] = 300
    other[1] |= {"name": "tokens-2"}
    other[1]["shards"]["from"]["tokenizer"] = "tok-2"
    value["spec"]["stages"][3:3] = other
    value["spec"]["stages"][5]["pretrain"]["from"]["shards"] = "tokens-2"
    run = parse_run(value)
    pretrain = run.spec.stages[5].pretrain
    assert pretrain is not None and vocab_size(run, pretrain) == 300


# Rank 32 of llama-7b's matrices: 4096 -> 3 x 4096, 4096 -> 4096, 4096 -> 2 x 11008, 11008 -> 4096; 32 layers.
UPDATES = 32 * 32 * ((4096 + 12288) + (4096 + 4096) + (4096 + 22016) + (11008 + 4096))


def tuned(kind: str = "sft", *, compute: dict[str, Any], **block: Any) -> TrainingRun:
    """llama-7b, and a stage that trains it further in bf16 on one rank, unless it says otherwise."""
    value = seven_billion(compute={"nodes": 16, "gpusPerNode": 1}).dump()
    block = {"from": {"model": "base"}, "data": {"sources": [{"uri": "/records"}]}} | block
    value["spec"]["stages"][4:] = [{"name": "chat", "compute": compute, kind: block}]
    return parse_run(value)


def of_stage(run: TrainingRun) -> Estimate:
    found = least_estimate(run, run.spec.stages[4], on_gpus=True)
    assert found is not None
    return found


def test_parameters_of_an_adapter() -> None:
    assert Lora().num_parameters(LLAMA_7B) == UPDATES == 67_371_008
    attention = Lora(rank=8, targets=[LoraTarget.QKV, LoraTarget.PROJ])
    assert attention.num_parameters(LLAMA_7B) == 32 * 8 * (16384 + 8192)
    # Of four ranks each has the whole side of the residual stream, and a quarter of the other one.
    assert attention.num_parameters(LLAMA_7B, tensor=4) == 32 * 8 * ((4096 + 3072) + (4096 + 1024))


def test_an_adapter_leaves_the_state_of_the_model_out() -> None:
    whole, adapted = (
        of_stage(tuned(compute={"gpusPerNode": 1}, **fields)) for fields in ({}, {"adapter": {"lora": {}}})
    )
    assert (whole.trained_parameters, adapted.trained_parameters) == (6_738_415_616, UPDATES)
    assert adapted.parameters == whole.parameters + UPDATES
    assert whole.state_bytes_per_rank == 18 * WHOLE
    assert adapted.state_bytes_per_rank == 2 * WHOLE + 18 * UPDATES
    assert whole.flops_per_step == 6 * whole.parameters * 1024 * 16
    assert adapted.flops_per_step == (4 * whole.parameters + 6 * UPDATES) * 1024 * 16
    # What records say is not known before they are read.
    assert (whole.steps, whole.tokens, whole.tokens_per_parameter, whole.flops) == (None, None, None, None)


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
def test_what_trains_a_model_further_is_refused_where_its_state_is_too_large(kind: str) -> None:
    def refused(run: TrainingRun, gpu_memory: int) -> list[tuple[str, bool]]:
        """Where the stage is refused, and whether an adapter is what helps."""
        errors = device_errors(run, gpu_memory=gpu_memory)
        return [(e.field, "adapter.lora" in e.remedy) for e in errors if "stages[4]" in e.field]

    field = f"spec.stages[4].{kind}.parallelism"
    whole = tuned(kind, compute={"gpusPerNode": 1})
    adapted = tuned(kind, compute={"gpusPerNode": 1}, adapter={"lora": {}})
    assert refused(whole, 18 * WHOLE) == []
    assert refused(whole, 18 * WHOLE - 1) == [(field, True)]
    assert refused(adapted, 2 * WHOLE + 18 * UPDATES) == []
    assert refused(adapted, 2 * WHOLE + 18 * UPDATES - 1) == [(field, False)]


def test_a_model_that_is_trained_twice_keeps_its_vocabulary() -> None:
    value = tuned(compute={}).dump()
    second = copy.deepcopy(value["spec"]["stages"][4])
    second |= {"name": "again"}
    second["sft"]["from"]["model"] = "chat"
    value["spec"]["stages"].append(second)
    run = parse_run(value)
    assert run.spec.stages[5].training is not None
    assert vocab_size(run, run.spec.stages[5].training) == VOCAB
