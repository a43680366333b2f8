"""Finding faces in real photos that packages ship, without any model to download."""

import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageOps

from nested_attention import NestedAttentionError, faces
from nested_attention.faces import FRAME, SAID, Face, cropped, ffhq_quad, find_faces, frame, framed


def photo(package: str, name: str) -> Image.Image:
    return Image.open(str(files(package).joinpath(name))).convert("RGB")


ASTRONAUT = photo("skimage", "data/astronaut.png")
CHELSEA = photo("skimage", "data/chelsea.png")
PORTRAIT = photo("insightface", "data/images/Tom_Hanks_54745.png")
GROUP = photo("insightface", "data/images/t1.jpg")
UPSIDE_DOWN = Image.Transpose.ROTATE_180


@pytest.fixture(autouse=True)
def no_models(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("INSIGHTFACE_HOME", str(tmp_path))


def middle(face: Face) -> tuple[float, float]:
    return (face.box[0] + face.box[2]) / 2, (face.box[1] + face.box[3]) / 2


CHANGED = {
    "as it is": (lambda image: image, lambda x, y, w, h: (x, y)),
    "mirrored": (ImageOps.mirror, lambda x, y, w, h: (w - x, y)),
    "turned left": (lambda image: image.transpose(Image.Transpose.ROTATE_90), lambda x, y, w, h: (y, w - x)),
    "upside down": (lambda image: image.transpose(UPSIDE_DOWN), lambda x, y, w, h: (w - x, h - y)),
    "grey": (lambda image: image.convert("L").convert("RGB"), lambda x, y, w, h: (x, y)),
}


@pytest.mark.parametrize("change", CHANGED)
@pytest.mark.parametrize(
    ("image", "kind", "true"), [(ASTRONAUT, "person", (225, 114)), (CHELSEA, "cat", (236, 150)), (PORTRAIT, "person", (56, 59))]
)
def test_the_face_is_found_however_the_photo_lies(image: Image.Image, kind: str, true: tuple[float, float], change: str) -> None:
    changed, moved = CHANGED[change]
    found = find_faces(changed(image), kind)
    side = found[0].box[2] - found[0].box[0]
    expected = moved(*true, *image.size)
    assert np.hypot(*np.subtract(middle(found[0]), expected)) < 0.15 * side
    assert found[0].method == "opencv"


def test_threads_find_what_one_alone_finds() -> None:
    pictures = [(image, kind) for image, kind in ((ASTRONAUT, "person"), (PORTRAIT, "person"), (CHELSEA, "cat"), (PORTRAIT, "cat"))] * 2
    alone = [[face.box for face in find_faces(*picture)] for picture in pictures[:4]] * 2
    with ThreadPoolExecutor(4) as threads:
        together = [[face.box for face in faces] for faces in threads.map(lambda picture: find_faces(*picture), pictures)]
    assert together == alone


def test_a_group_gives_six_choices_the_largest_first() -> None:
    found = find_faces(GROUP, "person")
    assert len(found) == 6
    assert [face.area for face in found] == sorted((face.area for face in found), reverse=True)


@pytest.mark.parametrize("name", ["data/rocket.jpg", "data/brick.png", "data/coffee.png"])
def test_no_face_is_invented(name: str) -> None:
    image = photo("skimage", name)
    assert find_faces(image, "person") == [] and find_faces(image, "cat") == []


def test_tiny_photos_and_other_kinds() -> None:
    assert find_faces(PORTRAIT.resize((56, 56)), "person")
    assert find_faces(ASTRONAUT.resize((16, 16)), "person") == []
    assert find_faces(ASTRONAUT, "vehicle") == []


def test_a_frame_is_upright_and_holds_the_face_in_its_middle() -> None:
    upright = framed(ASTRONAUT, find_faces(ASTRONAUT, "person")[0])
    assert upright.size == (FRAME, FRAME)
    turned = ASTRONAUT.transpose(UPSIDE_DOWN)
    again = framed(turned, find_faces(turned, "person")[0])
    smaller = [np.asarray(image.resize((64, 64)), float) for image in (upright, again)]
    assert np.abs(smaller[0] - smaller[1]).mean() < 12
    found = find_faces(upright, "person")[0]
    assert all(0.4 * FRAME < value < 0.62 * FRAME for value in middle(found))


def test_ffhq_frames_turn_with_the_eyes() -> None:
    """Eyes on a level line give a level frame; the same points turned give the same frame turned."""
    points = np.array([(40, 50), (60, 50), (50, 62), (43, 72), (57, 72)], float)
    quad = ffhq_quad(points)
    assert np.allclose(quad[0][1], quad[3][1]) and np.allclose(quad[0][0], quad[1][0])
    angle = 0.4
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    assert np.allclose(ffhq_quad(points @ turn.T), quad @ turn.T)


def test_the_users_own_crop() -> None:
    assert cropped(ASTRONAUT, (0.25, 0.0, 0.75, 0.5)).size == (256, 256)
    with pytest.raises(NestedAttentionError, match="empty or lies outside"):
        cropped(ASTRONAUT, (0.5, 0.0, 0.5, 1.0))


def test_a_pets_face_is_looked_for_as_a_cats() -> None:
    assert [face.box for face in find_faces(CHELSEA, "pet")] == [face.box for face in find_faces(CHELSEA, "cat")] != []


def test_a_face_is_chosen_by_its_size() -> None:
    found = find_faces(GROUP, "person")
    second = frame(GROUP, "person", "face 2")
    assert (second.said, second.faces) == (f"{SAID['opencv']}, face 2 of 6 by size", 6)
    assert second.image.tobytes() == framed(GROUP, found[1]).tobytes() != frame(GROUP, "person").image.tobytes()
    beyond = frame(GROUP, "person", "face 7")
    assert beyond.image is GROUP and beyond.said.startswith("only 6 found: the whole picture")


def test_insightface_is_asked_in_its_colours_and_gives_ffhqs_frame(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    points = np.array([(205, 105), (245, 105), (225, 128), (210, 148), (240, 148)], np.float32)
    small = SimpleNamespace(bbox=np.array([10, 10, 20, 20], np.float32), kps=points / 10)
    large = SimpleNamespace(bbox=np.array([180, 60, 270, 170], np.float32), kps=points)
    seen = []

    def get(pixels: np.ndarray) -> list[SimpleNamespace]:
        seen.append(pixels)
        return [small, large]

    monkeypatch.setattr(faces, "insightface_analysis", lambda: SimpleNamespace(get=get))
    assert find_faces(ASTRONAUT, "person")[0].method == "opencv" and not seen  # no models, and not allowed to fetch them
    (tmp_path / "models/buffalo_l").mkdir(parents=True)
    (tmp_path / "models/buffalo_l/det_10g.onnx").touch()
    found = frame(ASTRONAUT, "person")
    assert (found.said, found.faces) == (f"{SAID['insightface']}, face 1 of 2 by size", 2)
    assert np.array_equal(seen[0], np.asarray(ASTRONAUT)[..., ::-1])
    expected = Face((180.0, 60.0, 270.0, 170.0), ffhq_quad(points.astype(float)), "insightface")
    assert found.image.tobytes() == framed(ASTRONAUT, expected).tobytes()
    assert find_faces(CHELSEA, "cat")[0].method == "opencv" and len(seen) == 1


def test_damaged_models_are_told_and_other_ways_stay(tmp_path) -> None:
    (tmp_path / "models/buffalo_l").mkdir(parents=True)
    (tmp_path / "models/buffalo_l/det_10g.onnx").write_bytes(b"cut off")
    with pytest.raises(NestedAttentionError, match=rf"insightface's models are damaged .* delete {tmp_path}/models/buffalo_l"):
        frame(ASTRONAUT, "person")
    assert frame(ASTRONAUT, "person", "whole").said == SAID["whole"] and find_faces(CHELSEA, "cat")[0].method == "opencv"


@pytest.mark.parametrize("package", faces.PACKAGES)
def test_without_its_package_insightface_is_not_asked(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "insightface.app", raising=False)
    monkeypatch.delitem(sys.modules, "insightface.app.face_analysis", raising=False)
    (tmp_path / "models/buffalo_l").mkdir(parents=True)
    (tmp_path / "models/buffalo_l/det_10g.onnx").touch()
    assert not faces.insightface_ready()
    with pytest.raises(NestedAttentionError, match=rf"insightface cannot be used \(.*{package}.*\); install it with `pip install"):
        faces.insightface_analysis()
    assert (tmp_path / "models/buffalo_l/det_10g.onnx").exists()


def test_a_download_that_fails_leaves_the_way_open_for_the_next(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Cut off, it leaves a folder without models, and where a folder is, the package fetches nothing."""

    def cut_off(url: str, path: str, overwrite: bool) -> None:
        with open(path, "wb") as file:
            file.write(b"PK")

    monkeypatch.setattr("insightface.utils.storage.download_file", cut_off)
    (tmp_path / "models").mkdir()
    with pytest.raises(NestedAttentionError, match=r"insightface's models cannot be had .*; connect to the internet"):
        faces.insightface_analysis()
    assert not (tmp_path / "models/buffalo_l").exists()
    assert find_faces(ASTRONAUT, "person")[0].method == "opencv"
