"""The pipeline on tiny real SD and SDXL components."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPConfig, CLIPImageProcessor

from nested_attention import Cancelled, NestedAttentionError, NestedAttentionPipeline, Progress, SubjectCache, trace
from nested_attention.adapters import cross_attention_layers
from nested_attention.attention import LayerSubject, nested_values
from nested_attention.condition import NestedCondition
from nested_attention.pipeline import Generation, own_copy
from nested_attention.prompts import Prompt, fill
from tests import tiny
from tests.tiny import photo, pixels

PROMPT = "a drawing of <person> and <cat> on the beach"


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def pipe(request: pytest.FixtureRequest) -> NestedAttentionPipeline:
    return tiny.pipeline(request.param)


def both(pipe: NestedAttentionPipeline, **knobs: float) -> list:
    return [pipe.encode("person", photo(1), **knobs), pipe.encode("cat", [photo(2), photo(3)], **knobs)]


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_no_subject_is_stock_diffusers_bit_for_bit(pipe: NestedAttentionPipeline, guidance_scale: float) -> None:
    ours = pipe("a man on the beach", steps=3, seed=5, guidance_scale=guidance_scale)
    name = "sdxl" if hasattr(pipe.stock, "text_encoder_2") else "sd"
    generators = [torch.Generator().manual_seed(5)]
    stock = tiny.stock(name)(
        "a man on the beach",
        negative_prompt="",
        height=32,
        width=32,
        num_inference_steps=3,
        guidance_scale=guidance_scale,
        generator=generators,
    )
    assert np.array_equal(np.asarray(ours.images[0]), np.asarray(stock.images[0]))


def test_strength_zero_is_the_ordinary_word(pipe: NestedAttentionPipeline) -> None:
    without = pipe("a drawing of person and cat on the beach", seed=3)
    zero = pipe(PROMPT, both(pipe, strength=0.0), seed=3)
    one = pipe(PROMPT, both(pipe), seed=3)
    assert abs(pixels(without) - pixels(zero)).max() <= 1
    assert abs(pixels(without) - pixels(one)).max() > 2


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 32)])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_plain_form_gives_the_same_picture(pipe: NestedAttentionPipeline, guidance_scale: float, height: int, width: int) -> None:
    settings = {"seed": 1, "num_images": 2, "guidance_scale": guidance_scale, "height": height, "width": width}
    expected = pixels(pipe(PROMPT, both(pipe), **settings))
    with tiny.plain_form() as seen:
        assert abs(expected - pixels(pipe(PROMPT, both(pipe), **settings))).max() <= 1
    assert set(seen) == {2}


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (4, 2), (3, 3)])
@pytest.mark.parametrize("grid", [(16, 16), (24, 16)])
@pytest.mark.parametrize("count", range(5))
def test_a_step_is_the_same_in_both_forms(pipe: NestedAttentionPipeline, count: int, grid: tuple[int, int], batch: int, rows: int) -> None:
    """0 to 4 subjects, square or not, with guidance (the first half of four rows is unconditional) and without."""
    kinds = ("person", "cat", "cat", "person")[:count]
    layers = tiny.layers([pipe.encode(kind, photo(k), f"<{kind}{k}>", strength=0.5 + 0.3 * k) for k, kind in enumerate(kinds)])
    fast = tiny.step(pipe, NestedCondition(rows, layers), batch, grid)
    with tiny.plain_form():
        torch.testing.assert_close(tiny.step(pipe, NestedCondition(rows, layers), batch, grid), fast, atol=1e-5, rtol=1e-5)


def test_unconditional_half_is_untouched(pipe: NestedAttentionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sees no subject at all, and nothing nested is computed for it."""
    stock, ours = (tiny.step(pipe, made, 4) for made in (None, NestedCondition(2, tiny.layers(both(pipe)))))
    torch.testing.assert_close(stock[:2], ours[:2], atol=1e-5, rtol=1e-5)
    assert (stock[2:] - ours[2:]).abs().max() > 1e-3
    seen: list[int] = []

    def counted(query: torch.Tensor, subject: LayerSubject) -> torch.Tensor:
        seen.append(len(query))
        return nested_values(query, subject)

    monkeypatch.setattr("nested_attention.attention.nested_values", counted)
    pipe(PROMPT, both(pipe), steps=1, num_images=3, guidance_scale=5.0)
    assert set(seen) == {3}


def test_what_a_layer_makes_of_the_text_is_made_once(pipe: NestedAttentionPipeline) -> None:
    """And anew for another text, and wherever gradients flow."""
    condition, layers = NestedCondition(1, tiny.layers(both(pipe))), cross_attention_layers(pipe.stock.unet)
    seen: list[str] = []
    hooks = [layer.to_k.register_forward_hook(lambda *_, name=name: seen.append(name)) for name, layer in layers.items()]
    one, other = torch.randn(2, 2, 24, pipe.stock.unet.config.cross_attention_dim)
    made = [tiny.step(pipe, condition, states=one) for _ in range(3)]
    assert seen == list(condition.texts) and sorted(seen) == sorted(layers) and torch.equal(made[0], made[2])
    anew = tiny.step(pipe, condition, states=other)
    assert len(seen) == 2 * len(layers)
    torch.testing.assert_close(anew, tiny.step(pipe, NestedCondition(1, condition.layers), states=other))
    with torch.enable_grad():
        name, layer = next(iter(layers.items()))
        fresh = NestedCondition(1, condition.layers)
        fresh.text(name, layer, one)
    assert not fresh.texts
    for hook in hooks:
        hook.remove()


class Operations(TorchDispatchMode):
    """Counts what is computed inside; looking at a tensor in another way is nothing."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not function.is_view
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_subject_adds_few_operations_to_a_layer(architecture: str) -> None:
    """A fast GPU waits for each of them to be asked for, however little it computes."""
    pipe = tiny.pipeline(architecture, value_norm="full")
    subjects = [pipe.encode("person", photo(k), f"<person{k}>") for k in range(4)]
    states = torch.randn(2, 24, pipe.stock.unet.config.cross_attention_dim)
    counts = []
    for condition in (None, *(NestedCondition(1, tiny.layers(subjects[:count])) for count in (1, 2, 4))):
        tiny.step(pipe, condition, states=states)
        with Operations() as seen:
            tiny.step(pipe, condition, states=states)
        counts.append(seen.count)
    added = [(count - counts[0]) / len(cross_attention_layers(pipe.stock.unet)) for count in counts[1:]]
    assert added[0] <= 5 and added[1] <= 10 and added[2] <= 20


def test_a_negative_prompt_changes_the_picture_where_there_is_guidance(pipe: NestedAttentionPipeline) -> None:
    drawn = {
        (scale, negative): pixels(pipe(PROMPT, both(pipe), seed=4, guidance_scale=scale, negative_prompt=negative))
        for scale in (1.0, 5.0)
        for negative in ("", "a man in the snow")
    }
    assert np.array_equal(drawn[1.0, ""], drawn[1.0, "a man in the snow"])
    assert abs(drawn[5.0, ""] - drawn[5.0, "a man in the snow"]).max() > 2


def test_images_of_a_batch_are_the_images_of_their_seeds(pipe: NestedAttentionPipeline) -> None:
    batch = pixels(pipe(PROMPT, both(pipe), seed=10, num_images=3))
    single = pixels(pipe(PROMPT, both(pipe), seed=12))
    assert abs(batch[2] - single[0]).max() <= 1
    assert np.array_equal(batch, pixels(pipe(PROMPT, both(pipe), seed=10, num_images=3)))


def test_second_use_of_a_picture_encodes_and_projects_nothing(pipe: NestedAttentionPipeline) -> None:
    calls: list[str] = []
    encoder = pipe.image_encoders.get(pipe.adapters["person"].config)
    hooks = [encoder.register_forward_hook(lambda *_: calls.append("encoder"))]
    hooks += [layer.register_forward_hook(lambda *_: calls.append("projection")) for layer in pipe.adapters["person"].layers]
    cache = SubjectCache()
    first = pipe.encode("person", photo(7), cache=cache)
    once = len(calls)
    second = pipe.encode("person", photo(7), strength=0.5, cache=cache)
    pipe("<person> in the snow", [second], steps=2)
    for hook in hooks:
        hook.remove()
    assert once == 1 + len(pipe.adapters["person"].layers)
    assert len(calls) == once and second.images == first.images
    one, two = (subject.layer_subjects(torch.zeros(1, 4)) for subject in (first, second))
    assert all(one[name].key is two[name].key and one[name].key.is_contiguous() for name in one)  # nothing is copied for a request


def test_cache_forgets_the_least_recently_used(pipe: NestedAttentionPipeline) -> None:
    size = pipe.encode("person", photo(0)).images[0].bytes
    cache = SubjectCache(max_bytes=2 * size)
    for seed in (0, 1, 0, 2):
        pipe.encode("person", photo(seed), cache=cache)
    keys = [cache.key(pipe.encode("person", photo(seed)).images[0].picture, "person") for seed in (0, 1, 2)]
    assert [cache.get(key) is not None for key in keys] == [True, False, True]


def test_two_requests_at_once_never_meet(pipe: NestedAttentionPipeline) -> None:
    requests = [
        ("<person> in the snow", [pipe.encode("person", photo(1))], {"seed": 1, "steps": 6}),
        ("a drawing of <cat> and <person>", both(pipe, strength=0.7), {"seed": 2, "steps": 4, "guidance_scale": 6.0}),
    ]
    alone = [pixels(pipe(prompt, subjects, **settings)) for prompt, subjects, settings in requests]
    together: dict[int, np.ndarray] = {}
    traced: dict[int, set[str]] = {}
    start = threading.Barrier(2)

    def work(k: int) -> None:
        prompt, subjects, settings = requests[k]
        start.wait()
        with trace(pipe) as maps:
            together[k] = pixels(pipe(prompt, subjects, **settings))
        traced[k] = set(maps.placeholders)

    threads = [threading.Thread(target=work, args=(k,)) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(alone[k], together[k]) for k in (0, 1))
    assert traced == {0: {"<person>"}, 1: {"<person>", "<cat>"}}


def test_order_of_subjects_does_not_matter(pipe: NestedAttentionPipeline) -> None:
    subjects = both(pipe)
    assert abs(pixels(pipe(PROMPT, subjects, seed=4)) - pixels(pipe(PROMPT, subjects[::-1], seed=4))).max() <= 1


def test_tracing_changes_nothing_and_its_rows_sum_to_one(pipe: NestedAttentionPipeline) -> None:
    subjects = both(pipe)
    without = pixels(pipe(PROMPT, subjects, seed=8, num_images=2, height=48))
    with trace(pipe) as maps:
        traced = pixels(pipe(PROMPT, subjects, seed=8, num_images=2, height=48))
    assert np.array_equal(without, traced)
    cat = maps.subject("<cat>")
    for third in (None, 0, 1, 2):
        outer = cat.outer(third=third)
        assert outer.shape == (2, *maps.resolutions[0]) and outer.min() >= 0 and outer.max() <= 1
        for rows in (cat.words(third=third), cat.nested(third=third), cat.lens(third=third)):
            torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]), atol=1e-4, rtol=0)
    assert cat.nested().shape[-1] == 12  # two pictures of six tokens
    resolution = maps.resolutions[-1]
    assert cat.outer(layer=resolution).shape == (2, *resolution)
    values, word = cat.values(resolution)
    assert values.shape[:3] == (2, *resolution) and word.shape == values.shape[3:]
    with pytest.raises(NestedAttentionError, match="<dog>"):
        maps.subject("<dog>")
    with pytest.raises(NestedAttentionError, match="no maps of resolution 5 x 7, third None"):
        cat.nested((5, 7))
    with pytest.raises(NestedAttentionError, match=r"resolution down_blocks\.0"):
        cat.outer("down_blocks.0")


def test_every_pipeline_is_traced_by_the_innermost_of_its_blocks(pipe: NestedAttentionPipeline) -> None:
    other = tiny.pipeline("sd")
    with trace(pipe) as outer, trace(other) as of_other:
        pipe("<person>", both(pipe)[:1], steps=1)
        with trace(pipe) as inner:
            pipe("<cat>", both(pipe)[1:], steps=1)
    assert (outer.placeholders, inner.placeholders, of_other.placeholders) == (("<person>",), ("<cat>",), ())


def test_values_are_those_that_the_strength_leaves(pipe: NestedAttentionPipeline) -> None:
    subject = pipe.encode("person", photo(1))
    seen = []
    for strength in (0.0, 0.5, 1.0):
        with trace(pipe) as maps:
            pipe("<person> on the beach", [subject.but(strength=strength)], seed=3, steps=1)
        values, word = maps.subject("<person>").values(maps.resolutions[0])
        seen.append(values - word)
    torch.testing.assert_close(seen[0], torch.zeros_like(seen[0]), atol=1e-6, rtol=0)
    assert seen[2].abs().max() > 0.01
    torch.testing.assert_close(seen[1], seen[2] / 2, atol=1e-5, rtol=1e-4)


def test_of_many_layers_each_step_watches_some(pipe: NestedAttentionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the steps every layer has its turn; what is kept still sums to one, in every part of the schedule."""
    monkeypatch.setattr("nested_attention.tracing.WATCHED", 2)
    with trace(pipe) as maps:
        pipe(PROMPT, both(pipe), seed=1, steps=6)
    assert maps.recorder is not None and maps.recorder.layers > 2
    everyone = {"all": None, "beginning": 0, "middle": 1, "end": 2}
    for third in everyone.values():
        for grid in maps.resolutions:
            words = maps.subject("<cat>").words(grid, third)
            torch.testing.assert_close(words.sum(-1), torch.ones(words.shape[:-1]), atol=1e-4, rtol=0)
            assert maps.subject("<cat>").values(grid, third)[0].shape[1:3] == grid
    seen = sum(mean.count for mean in maps.recorder.outer.values())
    assert seen < 6 * maps.recorder.layers


def test_stream_reports_every_step_and_ends_with_the_result(pipe: NestedAttentionPipeline) -> None:
    events = list(pipe.stream(PROMPT, both(pipe), seed=3, steps=3))
    assert [event.step for event in events[:-1] if isinstance(event, Progress)] == [1, 2, 3]
    assert isinstance(events[0], Progress) and events[0].previews()[0].size == (32, 32)
    assert isinstance(events[-1], Generation)
    assert np.array_equal(pixels(events[-1]), pixels(pipe(PROMPT, both(pipe), seed=3, steps=3)))


@pytest.mark.parametrize(("kind", "steps"), [(EulerDiscreteScheduler, 4), (PNDMScheduler, 5), (HeunDiscreteScheduler, 7)])
def test_steps_are_those_that_the_scheduler_takes(kind: Any, steps: int) -> None:
    """Some take more than the four that are asked for."""
    pipe = tiny.pipeline("sd")
    pipe.stock.scheduler = kind.from_config(pipe.stock.scheduler.config, skip_prk_steps=True)
    with trace(pipe) as maps:
        *events, _ = pipe.stream("<person>", [pipe.encode("person", photo(1))], steps=4)
    assert [(event.step, event.steps) for event in events] == [(k + 1, steps) for k in range(steps)]
    assert events[-1].previews()[0].size == (32, 32) and maps.thirds == (0, 1, 2)
    assert maps.recorder is not None and maps.recorder.steps == steps


def test_closing_a_stream_cancels(pipe: NestedAttentionPipeline) -> None:
    steps: list[int] = []
    stepping = pipe.stock.unet.register_forward_hook(lambda *_: steps.append(1))
    stream = pipe.stream(PROMPT, both(pipe), steps=100)
    next(stream)
    stream.close()
    stepping.remove()
    assert len(steps) < 50 and all(thread.name != "generation" for thread in threading.enumerate())
    with pytest.raises(Cancelled):
        pipe("a cat", callback=lambda progress: (_ for _ in ()).throw(Cancelled()))


@pytest.mark.parametrize(
    ("prompt", "kinds", "words"),
    [
        ("a man on the beach", ["person"], "does not say where <person>"),
        ("<person> and <cat>", ["person"], "names <cat>"),
        ("<dog> on the beach", [], "no subject was given"),
        ("word " * 60 + "<person>", ["person"], "move it forward"),
        ("<person>", ["person", "person"], "two subjects are called <person>"),
        ("   ", [], "prompt is empty"),
        ("a" * 5000, [], "5000 characters"),
    ],
)
def test_prompts_that_do_not_fit_say_why(pipe: NestedAttentionPipeline, prompt: str, kinds: list[str], words: str) -> None:
    with pytest.raises(NestedAttentionError, match=words):
        pipe(prompt, [pipe.encode(kind, photo(1)) for kind in kinds])


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0}, {"steps": 2.5}, {"steps": "ten"}, {"num_images": 9}, {"guidance_scale": -1}, {"guidance_scale": float("nan")},
        {"seed": -1}, {"seed": 2**40}, {"height": 33}, {"width": 4096},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(pipe: NestedAttentionPipeline, settings: dict) -> None:
    with pytest.raises(NestedAttentionError, match=next(iter(settings))):
        pipe("a cat", **settings)


@pytest.mark.parametrize("knobs", [{"strength": -0.1}, {"strength": 9}, {"lam": 99}, {"token_weight": 0}, {"strength": "much"}])
def test_knobs_out_of_range_are_named(pipe: NestedAttentionPipeline, knobs: dict) -> None:
    with pytest.raises(NestedAttentionError, match=next(iter(knobs))):
        pipe.encode("person", photo(1), **knobs)


def test_unknown_kind_and_bad_placeholder(pipe: NestedAttentionPipeline) -> None:
    with pytest.raises(NestedAttentionError, match=r"dragon.*person, cat"):
        pipe.encode("dragon", photo(1))
    with pytest.raises(NestedAttentionError, match="angle brackets"):
        pipe.encode("person", photo(1), placeholder="ada")
    with pytest.raises(NestedAttentionError, match="at least one"):
        pipe.encode("person", [])
    with pytest.raises(NestedAttentionError, match="9 pictures of <person> were given; at most 8"):
        pipe.encode("person", [photo(1)] * 9)


def test_pictures_that_a_safety_checker_blanks_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A real one, to which nothing but the second of two pictures is bad; and then everything is."""
    pipe = tiny.pipeline("sd")
    drawn = pipe("a cat", seed=3, num_images=2)
    eyes, reader = tiny.vision(), CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=eyes.config.to_dict(), projection_dim=16)).eval()
    checker.vision_model.load_state_dict(eyes.vision_model.state_dict())
    checker.visual_projection.load_state_dict(eyes.visual_projection.state_dict())
    seen = torch.nn.functional.normalize(eyes(**reader(drawn.images, return_tensors="pt")).image_embeds.detach())
    checker.concept_embeds.data[:] = seen[1]
    checker.concept_embeds_weights.data[:] = (1 + seen[0] @ seen[1]) / 2  # between the likeness of the second to itself, and to the first
    checker.special_care_embeds_weights.data[:] = 2.0
    pipe.stock.register_modules(safety_checker=checker, feature_extractor=reader)
    found = pixels(pipe("a cat", seed=3, num_images=2))
    assert np.array_equal(found[0], pixels(drawn)[0]) and found[1].max() == 0
    assert capsys.readouterr().err.endswith("tiny: its safety checker blanked the pictures of seed 4; try others, or another prompt\n")
    checker.concept_embeds_weights.data[:] = -2.0
    with pytest.raises(NestedAttentionError, match="the safety checker of tiny blanked every picture; try another seed or prompt"):
        pipe("a cat", seed=3, num_images=2)


def test_a_placeholder_said_twice_means_the_subject_twice(pipe: NestedAttentionPipeline) -> None:
    with trace(pipe) as maps:
        pipe("<person> next to <person>", [pipe.encode("person", photo(1))], steps=1)
    assert len(maps.subject("<person>").columns) == 2


def test_a_muted_token_never_answers(pipe: NestedAttentionPipeline) -> None:
    subject = pipe.encode("person", photo(1)).but(muted=frozenset({0, 3}))
    with trace(pipe) as maps:
        pipe("<person>", [subject], steps=1)
    assert maps.subject("<person>").nested()[..., [0, 3]].max() == 0
    with pytest.raises(NestedAttentionError, match="muted"):
        subject.but(muted=frozenset(range(6)))


def test_prompts_that_are_read_at_once_never_meet(pipe: NestedAttentionPipeline) -> None:
    """Short and long ones, for the place of a word and for the text encoder, which pad and cut differently."""
    subject = pipe.encode("person", photo(1))
    prompts = [fill(text, {"<person>": "person"}) for text in ("<person>", "<person> on the beach", "<person> " + "in the snow " * 30)]

    def read(prompt: Prompt) -> tuple[tuple[int, ...], list[torch.Tensor]]:
        states = own_copy(pipe.stock, pipe.own).encode_prompt(
            prompt.text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=""
        )
        return pipe._columns(prompt, subject), states[:2]

    alone = [read(prompt) for prompt in prompts]

    def same(number: int) -> bool:
        columns, states = read(prompts[number % 3])
        return columns == alone[number % 3][0] and all(map(torch.equal, states, alone[number % 3][1]))

    with ThreadPoolExecutor(3) as threads:
        assert all(threads.map(same, range(150)))
