"""Errors of usage: one line, which names what was meant."""

import pytest

from engine.command_line import CommandParser
from latentrt.__main__ import main
from runtime.images.files import program_version


def said(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert told.err.startswith("error: ")
    return told.err


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("a", "--stepz", "3"), "did you mean --steps?"),
        (("a", "--seeed=3"), "did you mean --seed?"),
        (("a", "--stepz", "3", "--widht", "8"), "did you mean --steps and --width?"),
        (("a", "--xyzzy"), "unrecognized arguments: --xyzzy (`latentrt --help`"),
        (("a", "--steps", "x"), "argument --steps: invalid int value: 'x'"),
        (("--steps", "3"), "give a PROMPT, or --again with a picture"),
        (("a", "--cfg-scale", "7"), "did you mean --guidance-scale?"),
        (("a", "--cfg", "7", "--num_inference_steps", "9"), "--guidance-scale and --steps?"),
        (("a", "--num-inference-steps=9"), "did you mean --steps?"),
        (("a", "-W", "64", "-H", "64"), "did you mean --width and --height?"),
        (("a", "--size", "64x64"), "did you mean --height and --width?"),
        (("a", "--mask-image", "b.png"), "did you mean --mask?"),
        (("a", "--scheduler", "karras"), "did you mean --schedule?"),
        (("a", "--ckpt", "b"), "did you mean --model?"),
        (("--prompt", "a"), "did you mean PROMPT without an option?"),
        (("a", "red", "apple"), "red apple; a text of several words stands in quotes ("),
        (("a", "--device", "cuda"), "; did you mean --backend cuda? There are CPU, GPU, NPU ("),
        (("a", "--device", "cuda:1"), "'cuda:1'; did you mean --backend cuda? There are CPU"),
        (("a", "--device", "gpu"), "'gpu'; did you mean --device GPU? There are CPU, GPU, NPU ("),
        (("a", "--device", "xyz"), "invalid choice: 'xyz'; choose one of CPU, GPU, NPU ("),
        (("a", "--backend", "trt"), "; did you mean --backend tensorrt? There are cpu"),
        (("a", "--backend", "GPU"), "; did you mean --backend cuda? There are cpu"),
        (("a", "--backend", "openvno"), "; did you mean --backend openvino? There are cpu"),
        (("a", "--precision", "fp16"), "; did you mean --precision float16? There are float32"),
        (("a", "--noise", "gpu"), "; did you mean --noise cuda? There are cpu, cuda ("),
        (("a", "--seamless", "bth"), "'bth'; did you mean --seamless both? There are x, y, both ("),
        (("a", "--inpaint-area", "mask"), "; did you mean --inpaint-area masked? There are"),
        (("a", "--safety-action", "blr"), "; did you mean --safety-action blur? There are"),
        (("export", "pictogram", "--parts", "vae_decodr"), "; did you mean --parts vae_decoder?"),
        (("bench", "latecny"), "; did you mean latency? There are "),
        (("upscale", "a.png", "--upscaler", "b", "--precision", "bf16"), "--precision bfloat16? T"),
        (("batch", "a.txt", "-o", "b", "--cfg", "7"), "did you mean --guidance-scale?"),
        (("batch", "a.txt", "-o", "b", "--device", "cuda"), "did you mean --backend cuda?"),
        (("grid", "a", "--x", "seed=1", "--backend", "ort"), "did you mean --backend cpu?"),
        (("serve", "--backend", "CUDA"), "did you mean --backend cuda?"),
        (("export", "pictogram", "--backend", "trt"), "did you mean --backend tensorrt?"),
        (("a", "--negative", "b"), "--negative-prompt, --negative-scale; did you mean"),
        (("serve", "--prot", "3"), "did you mean --port? (`latentrt serve --help`"),
        (("info",), "the following arguments are required: FILE"),
        (("export", "info"), "the following arguments are required: FILE"),
        (("calibrate",), "arguments are required"),
    ],
)
def test_an_error_is_one_line(capsys, arguments, wanted):
    message = said(capsys, *arguments)
    assert wanted in message
    assert "None" not in message


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("txt2img", "a cat"), "draw"),
        (("upscal", "a.png"), "upscale"),
        (("bathc", "a.txt"), "batch"),
        (("convert", "a.ckpt"), "export"),
        (("grids", "a cat", "--x", "steps=1,2"), "grid"),
    ],
)
def test_a_subcommand_that_there_is_none_of(capsys, words, meant):
    assert main(words) == 2
    said = f"error: {words[0]} is no subcommand; did you mean `latentrt {meant}`?\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("words", "meant"),
    [(("grahps",), "graphs"), (("cahce", "--verify"), "cache"), (("inof", "a.png"), "info")],
)
def test_a_subcommand_of_export(capsys, words, meant):
    assert main(["export", *words]) == 2
    wanted = f"error: {words[0]} is no subcommand; did you mean `latentrt export {meant}`?\n"
    assert capsys.readouterr().err == wanted


@pytest.mark.parametrize("words", [("--version",), ("-V",), ("version",)])
def test_the_version_is_told(capsys, words):
    assert main(words) == 0
    assert capsys.readouterr().out == f"latentrt {program_version()}\n"


def test_help_without_dashes(capsys):
    assert main(["help"]) == 0
    assert "latentrt SUBCOMMAND ..." in capsys.readouterr().out


def test_a_model_of_the_hub_is_not_fetched(capsys):
    assert main(["a", "--model", "stabilityai/stable-diffusion-xl-base-1.0"]) == 2
    assert "nothing is fetched; download it first" in capsys.readouterr().err


def test_a_picture_that_is_not_there(capsys):
    assert main(["info", "none.png"]) == 2
    assert capsys.readouterr().err == "error: the picture none.png does not exist\n"


def test_a_parser_without_options(capsys):
    with pytest.raises(SystemExit):
        CommandParser(prog="x").parse_args(["--nothing"])
    assert capsys.readouterr().err == (
        "error: unrecognized arguments: --nothing (`x --help` lists the options)\n"
    )
