"""Pictures say that a model made them: by XMP, by a signature, by a watermark."""

import json
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from engine.backends.settings import BackendSettings
from latentrt.info import main as info
from runtime import Pipeline
from runtime import __main__ as command
from runtime.images.credentials import Credentials, describe_credentials
from runtime.images.files import read_settings, read_source_type, write_image, xmp_packet
from runtime.images.previews import write_animation
from tests.support.certificates import KEYS, write_certificates
from tests.support.pictures import drawing

WHOLE, COMPOSITE = "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
DRAW = ["a red apple", "--steps", "1", "--seed", "7", "--threads", "1", "--backend", "cpu"]
SETTINGS = {"prompt": "a", "sampler": "ddim", "seed": 7}


def facts(capsys, path):
    capsys.readouterr()
    assert info([str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def xmp_by_pillow(path):
    """Return the description's attributes, as Pillow finds the packet."""
    with Image.open(path) as image:
        found = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp")
        if found is None:
            segments = [data for name, data in image.applist if name == "APP1"]
            found = next(d.split(b"\0", 1)[1] for d in segments if d.startswith(b"http://ns.adobe"))
    text = found if isinstance(found, str) else found.decode()
    root = ElementTree.fromstring(text[text.index("<x:") : text.index("<?xpacket end")])
    return {key.split("}")[1]: value for key, value in root[0][0].attrib.items()}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_says_what_it_is_by_xmp(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write_image(drawing(40, 30), path, SETTINGS)
    assert read_source_type(path) == WHOLE
    said = xmp_by_pillow(path)
    assert said["DigitalSourceType"] == f"http://cv.iptc.org/newscodes/digitalsourcetype/{WHOLE}"
    assert said["CreatorTool"].startswith("Latentrt ")
    if suffix == ".png":
        assert read_settings(path) == SETTINGS


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_mark_changes_no_pixel_and_can_be_left_out(tmp_path, suffix):
    with_mark, without = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    write_image(drawing(40, 30), with_mark, SETTINGS)
    write_image(drawing(40, 30), without, SETTINGS, mark=False)
    assert read_source_type(without) is None
    assert b"DigitalSourceType" not in without.read_bytes()
    with Image.open(with_mark) as a, Image.open(without) as b:
        assert a.size == (30, 40)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.skipif(not shutil.which("exiftool"), reason="exiftool is not installed")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_exiftool_reads_it(tmp_path, suffix):
    write_image(drawing(40, 30), tmp_path / f"a{suffix}", SETTINGS)
    arguments = ["exiftool", "-j", "-XMP:all", str(tmp_path / f"a{suffix}")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    (said,) = json.loads(done.stdout)
    assert said["DigitalSourceType"].endswith(f"/{WHOLE}")
    assert said["CreatorTool"].startswith("Latentrt ")
    done = subprocess.run(
        ["exiftool", "-validate", "-warning", "-a", str(tmp_path / f"a{suffix}")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Error" not in done.stdout


def test_an_animation_is_marked_and_whole(tmp_path):
    frames = [drawing(32, 32), Image.new("RGB", (32, 32), "red")]
    write_animation(tmp_path / "a.webp", frames)
    assert read_source_type(tmp_path / "a.webp") == WHOLE
    with Image.open(tmp_path / "a.webp") as image:
        assert image.n_frames == 2
    write_animation(tmp_path / "b.webp", frames, source_type=None)
    assert read_source_type(tmp_path / "b.webp") is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, WHOLE),
        ({"image": drawing(64, 64)}, WHOLE),
        ({"image": drawing(64, 64), "mask": Image.new("L", (64, 64), 255)}, COMPOSITE),
        ({"image": drawing(64, 64), "extend": (0, 0, 16, 0)}, COMPOSITE),
    ],
)
def test_what_keeps_a_part_of_a_picture_is_a_composite(tmp_path, pipeline, options, expected):
    result = pipeline("a", num_inference_steps=2, seed=1, **options)
    write_image(result.images[0], tmp_path / "a.png", result.settings[0])
    assert read_source_type(tmp_path / "a.png") == expected


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load(settings=BackendSettings(threads=1))


def test_the_command_marks_every_file(tmp_path, capsys):
    out, animation = tmp_path / "a.jpg", tmp_path / "a.webp"
    more = ["--preview-steps", "1", "--animation", str(animation)]
    assert command.main([*DRAW, "-o", str(out), *more]) == 0
    for path in (out, animation, tmp_path / "a-steps.png"):
        assert read_source_type(path) == WHOLE, path
    assert command.main([*DRAW, "-o", str(out), *more, "--no-mark"]) == 0
    for path in (out, animation, tmp_path / "a-steps.png"):
        assert read_source_type(path) is None, path
    drawing(64, 64).save(tmp_path / "photo.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    painted = ["--image", str(tmp_path / "photo.png"), "--mask", str(tmp_path / "mask.png")]
    assert command.main([*DRAW, "-o", str(out), *more, *painted]) == 0
    for path in (out, animation, tmp_path / "a-steps.png"):
        assert read_source_type(path) == COMPOSITE, path


def test_a_marked_picture_is_drawn_again_bit_for_bit(tmp_path, certificates):
    chain, key = certificates
    first, again = tmp_path / "a.png", tmp_path / "b.png"
    signing = ["--c2pa-cert", str(chain), "--c2pa-key", str(key)]
    assert command.main([*DRAW, "-o", str(first), "--watermark", "SDV2", *signing]) == 0
    assert command.main(["--again", str(first), "-o", str(again), "--threads", "1"]) == 0
    with Image.open(first) as a, Image.open(again) as b:
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert read_settings(again) == read_settings(first)


@pytest.fixture
def certificates(tmp_path):
    pytest.importorskip("c2pa")
    return write_certificates(tmp_path)


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_signed_file_is_verified(tmp_path, capsys, suffix, kind):
    c2pa = pytest.importorskip("c2pa")
    sign = Credentials.read(*write_certificates(tmp_path, kind)).sign
    path = tmp_path / f"a{suffix}"
    write_image(drawing(128, 128), path, SETTINGS, sign=sign)
    with c2pa.Reader(path) as reader:
        report = json.loads(reader.json())
    assert report["validation_state"] == "Valid"
    said = facts(capsys, path)
    assert said["mark"] == WHOLE
    assert said["content_credentials"] == {
        "verified": "yes, nothing has changed since",
        "signed by": "A test's signer of Tests",
        "issuer": "in no list of trust",
        "source": WHOLE,
    }
    with Image.open(path) as image:
        assert image.size == (128, 128)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_changed_file_is_not_verified(tmp_path, certificates, suffix):
    path = tmp_path / f"a{suffix}"
    write_image(drawing(128, 128), path, {}, sign=Credentials.read(*certificates).sign)
    data = bytearray(path.read_bytes())
    at = data.index(b"DigitalSourceType")
    data[at : at + 7] = b"digital"
    path.write_bytes(data)
    assert describe_credentials(path)["verified"].startswith("no (")


def test_a_composite_is_signed_as_one(tmp_path, certificates):
    image, path = drawing(32, 32), tmp_path / "a.png"
    image.info["digital_source_type"] = COMPOSITE
    write_image(image, path, {}, sign=Credentials.read(*certificates).sign)
    assert describe_credentials(path)["source"] == COMPOSITE


def test_an_unsigned_file_says_so_and_so_does_a_missing_library(
    tmp_path, certificates, monkeypatch
):
    plain, signed = tmp_path / "a.png", tmp_path / "b.png"
    write_image(drawing(32, 32), plain, {})
    write_image(drawing(32, 32), signed, {}, sign=Credentials.read(*certificates).sign)
    assert describe_credentials(plain) == "none in the file"
    monkeypatch.setitem(__import__("sys").modules, "c2pa", None)
    assert describe_credentials(plain) == "none in the file"
    assert "not verified: install it with `pip install c2pa-python`" in describe_credentials(signed)


def test_a_file_that_only_mentions_it_is_not_signed(tmp_path):
    pytest.importorskip("c2pa")
    path = tmp_path / "a.png"
    write_image(drawing(32, 32), path, {"prompt": "jumbf and C2PA, jumb"})
    assert describe_credentials(path) == "none in the file"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--c2pa-cert", "{chain}"], "--c2pa-cert and --c2pa-key belong together"),
        (["--c2pa-cert", "{none}", "--c2pa-key", "{key}"], "cannot be read"),
        (["--c2pa-cert", "{key}", "--c2pa-key", "{key}"], "is no PEM file with a certificate"),
        (["--c2pa-cert", "{chain}", "--c2pa-key", "{chain}"], "is no PEM file with a private key"),
        (["--c2pa-cert", "{chain}", "--c2pa-key", "{other}"], "cannot be signed"),
        (["--watermark", "SDV25"], "give 1 to 4 printable ASCII characters"),
        (["--watermark", "é"], "give 1 to 4 printable ASCII characters"),
        (["--watermark", ""], "give 1 to 4 printable ASCII characters"),
        (["--watermark", "A", "--height", "56", "--width", "64"], "draw a larger one"),
    ],
)
def test_what_cannot_be_marked_is_one_sentence_and_no_file(
    tmp_path, certificates, capsys, arguments, said
):
    other = tmp_path / "other"
    other.mkdir()
    places = dict(zip(("chain", "key"), map(str, certificates), strict=True))
    places |= {"none": str(tmp_path / "none"), "other": str(write_certificates(other)[1])}
    given = [argument.format(**places) for argument in arguments]
    out = tmp_path / "a.png"
    assert command.main([*DRAW, "-o", str(out), *given]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_packet_is_what_iptc_and_adobe_say():
    packet = xmp_packet("trainedAlgorithmicMedia").decode()
    assert packet.startswith('<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>')
    assert packet.endswith('<?xpacket end="w"?>')


def test_settings_draw_the_same_picture_in_an_app(pipeline):
    """What a result was made with is what a call takes, painted or not."""
    painted = {"image": drawing(64, 64), "mask": Image.new("L", (64, 64), 255)}
    for options in ({}, painted):
        result = pipeline("a", seed=1, num_inference_steps=2, **options)
        again = pipeline(**result.settings[0], **options)
        np.testing.assert_array_equal(np.asarray(again.images[0]), np.asarray(result.images[0]))
