"""The text encoder of `python -m training diffusion`, and `synonyms`, which measures it."""

import argparse
import json
from pathlib import Path

import torch

from engine.configs.diffusion import TextEncoderConfig
from engine.errors import RequestError
from runtime.conditioning.tokenizer import Tokenizer
from training import devices, diffusion, quality, text_encoders
from training.dataset import PictogramTrainingSet, TrainingSet, load_training_set
from training.diffusers_folder import text_encoder_config, write_json
from training.vocabulary import cut_vocabulary, download_merges, write_tokenizer

TEXT_ENCODER = "text_encoder.json"  # in the working folder


def run_synonyms(options: argparse.Namespace) -> None:
    """Measure a model by words that no caption had; raises RequestError without pictograms."""
    data = load_training_set(options.work)
    if not isinstance(data, PictogramTrainingSet):
        raise RequestError(f"{options.work} holds no pictograms, whose synonyms are measured")
    found = quality.synonyms(options.model, data.pictograms, seeds=range(options.seeds))
    write_json(options.work / "synonyms.json", found)
    print(json.dumps(found, indent=2))


def prepare_text(
    options: argparse.Namespace, data: TrainingSet
) -> tuple[TextEncoderConfig | None, dict[str, torch.Tensor] | None, Tokenizer]:
    """Prepare what reads the text: its architecture but for CLIP's, weights that stay, tokens.

    The weights have their tensors' shapes, float32; None where they learn.
    """
    kind, folder = options.text_encoder, options.work / "tokenizer"
    text: TextEncoderConfig | None = None
    frozen: dict[str, torch.Tensor] | None = None
    with devices.first_alone() as first:
        text_encoders.check_tokenizer(kind, folder)
        if kind == "minilm":
            text, frozen = text_encoders.fetch_minilm(options.work / "packages", folder)
        elif first and not (folder / "tokenizer_config.json").exists():
            _learn_tokenizer(options, data, folder)
    tokenizer = Tokenizer.load(folder)
    if kind not in ("clip", "minilm"):
        width = diffusion.UNET.cross_attention_dim
        text = text_encoders.make_config(kind, tokenizer.vocab_size, width)
    if text is not None and devices.is_first():
        write_json(options.work / TEXT_ENCODER, text_encoder_config(text))
    return text, frozen, tokenizer


def _learn_tokenizer(options: argparse.Namespace, data: TrainingSet, folder: Path) -> None:
    texts, size = data.vocabulary_texts(), options.vocab_size
    if options.text_encoder == "clip":
        merges = download_merges(options.work / "packages")
        vocabulary, kept = cut_vocabulary(texts, size, merges)
        write_tokenizer(folder, vocabulary, kept, text_encoders.MAX_TOKENS)
    else:
        text_encoders.learn_tokenizer(options.text_encoder, texts, size, folder)
