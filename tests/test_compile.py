"""`torch.compile`: the U-Net with subjects is one graph, and knobs are tensors, so turning them compiles nothing anew."""

import torch

from nested_attention import trace
from nested_attention.condition import NestedCondition
from nested_attention.subjects import Subject
from tests import tiny


def condition(subjects: list[Subject]) -> NestedCondition:
    layers: dict[str, list] = {}
    for place, subject in enumerate(subjects):
        columns = torch.zeros(1, 24)
        columns[0, 4 + place] = 1
        for name, layer in subject.layer_subjects(columns).items():
            layers.setdefault(name, []).append(layer)
    return NestedCondition(1, layers)


def test_one_graph_for_any_strength() -> None:
    torch._dynamo.reset()
    pipe = tiny.pipeline("sdxl")
    unet = pipe.stock.unet
    subjects = [pipe.encode("person", tiny.photo(1), lam=1.5), pipe.encode("cat", tiny.photo(2))]
    latents, states = torch.randn(2, 4, 16, 16), torch.randn(2, 24, unet.config.cross_attention_dim)
    added = {"text_embeds": torch.randn(2, tiny.WIDTH), "time_ids": torch.ones(2, 6)}
    compiled = torch.compile(unet, fullgraph=True, backend="eager")

    def step(model, chosen: list[Subject]) -> torch.Tensor:
        nested = {"nested": condition(chosen)}
        return model(latents, torch.tensor(500), states, added_cond_kwargs=added, cross_attention_kwargs=nested).sample

    with torch.no_grad():
        step(compiled, subjects)
        with torch.compiler.set_stance("fail_on_recompile"):
            for strength in (0.3, 0.9, 1.4):
                changed = [subject.but(strength=strength, token_weight=2 * strength, lam=strength + 0.2) for subject in subjects]
                torch.testing.assert_close(step(compiled, changed), step(unet, changed), atol=1e-5, rtol=1e-4)


def test_a_pipeline_draws_with_a_compiled_unet() -> None:
    """The same picture, and nothing is compiled anew for another strength or another subject; a traced request leaves the graph."""
    torch._dynamo.reset()
    pipe = tiny.pipeline("sdxl")
    subjects = [pipe.encode("person", tiny.photo(k)) for k in (1, 2)]
    expected = [tiny.pixels(pipe("<person> on the beach", [subject], seed=3)) for subject in subjects]
    pipe.stock.unet.compile(backend="eager")
    found = tiny.pixels(pipe("<person> on the beach", subjects[:1], seed=3))
    with torch.compiler.set_stance("fail_on_recompile"):
        other = tiny.pixels(pipe("<person> on the beach", subjects[1:], seed=3))
        pipe("<person> on the beach", [subjects[0].but(strength=0.4)], seed=3)
    assert abs(found - expected[0]).max() <= 1 and abs(other - expected[1]).max() <= 1
    with trace(pipe) as maps:
        assert abs(tiny.pixels(pipe("<person> on the beach", subjects[:1], seed=3)) - expected[0]).max() <= 1
    words = maps.subject("<person>").words()
    torch.testing.assert_close(words.sum(-1), torch.ones(words.shape[:-1]), atol=1e-4, rtol=0)
