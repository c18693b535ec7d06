"""Content credentials (C2PA): a signed statement in a picture's file, by the app's own certificate.

The statement says that the picture was made by a trained model, and by which program; the signature
says who says so, and that not a byte has changed since. `c2pa-python` over the reference
implementation signs and verifies; nothing is fetched, neither a time stamp nor a revocation.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from PIL import Image

from engine.errors import BackendError, OutputError, RequestError, first_line, install
from runtime.images.files import SourceType, encode_image, program_version, source_type_url

__all__ = ["Credentials", "describe_credentials"]

MEDIA_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
ALGORITHMS = ("es256", "ps256", "ed25519", "es384", "es512", "ps384", "ps512")
MAX_PEM = 2**20  # bytes
SAMPLE: SourceType = "trainedAlgorithmicMedia"
UNTRUSTED = "signingCredential.untrusted"  # the issuer is in no list of trust, as none is given


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """Who signs: the certificate with its chain, and its private key, both as PEM."""

    certificate: bytes
    key: bytes

    @classmethod
    def read(cls, certificate: str | Path, key: str | Path) -> Self:
        """Read both files; raises RequestError when one cannot be read or is no PEM."""
        return cls(
            certificate=_pem("--c2pa-cert", Path(certificate), b"CERTIFICATE"),
            key=_pem("--c2pa-key", Path(key), b"PRIVATE KEY"),
        )

    def check(self) -> None:
        """Sign a picture of no use, so that what fails does so before others are drawn.

        Raises as `sign` does.
        """
        self.sign(encode_image(Image.new("RGB", (8, 8)), "PNG", {}), "PNG", SAMPLE)

    def sign(self, data: bytes, kind: str, source_type: SourceType) -> bytes:
        """Return a picture's file with the signed statement in it.

        kind: "PNG", "JPEG" or "WEBP"
        Raises BackendError without c2pa-python, OutputError when the key does not sign.
        """
        c2pa, refused = _import(), []
        statement = json.dumps(_statement(source_type))
        for algorithm in ALGORITHMS:  # the key's own is the one that signs
            try:
                info = c2pa.C2paSignerInfo(algorithm.encode(), self.certificate, self.key, None)
                signed = io.BytesIO()
                with c2pa.Signer.from_info(info) as signer, c2pa.Builder(statement) as builder:
                    builder.sign(signer, MEDIA_TYPES[kind], io.BytesIO(data), signed)
                return signed.getvalue()
            except c2pa.C2paError as error:
                refused.append(first_line(error))
        raise OutputError(
            f"the picture cannot be signed ({refused[0]}); give a certificate for signing with its "
            "chain, and the private key that belongs to it, as PEM"
        )


def describe_credentials(path: Path) -> dict[str, Any] | str:
    """Say what is signed in a picture's file, and whether it holds, as values of JSON.

    Nothing is sent or fetched. Raises OSError when the file cannot be read.
    """
    data = path.read_bytes()
    if b"jumb" not in data and b"C2PA" not in data:  # where PNG, JPEG and WebP keep it
        return "none in the file"
    try:
        c2pa = _import()
    except BackendError:
        return f"there, and not verified: {install('c2pa-python', 'c2pa')}"
    media_type = MEDIA_TYPES[_kind(data)]
    try:
        with c2pa.Reader(media_type, io.BytesIO(data)) as reader:
            report = json.loads(reader.json())
    except c2pa.C2paError as error:
        found = "ManifestNotFound" in str(error)
        return "none in the file" if found else f"damaged ({first_line(error)})"
    return _summary(report)


def _summary(report: Mapping[str, Any]) -> dict[str, Any]:
    manifest = report["manifests"][report["active_manifest"]]
    codes = [status["code"] for status in report.get("validation_status", ())]
    signature = manifest.get("signature_info", {})
    actions = [
        action.get("digitalSourceType", "").rsplit("/", 1)[-1]
        for assertion in manifest.get("assertions", ())
        if assertion["label"].startswith("c2pa.actions")
        for action in assertion["data"].get("actions", ())
    ]
    broken = [code for code in codes if code != UNTRUSTED]
    holds = report.get("validation_state") != "Invalid" and not broken
    return {
        "verified": "yes, nothing has changed since" if holds else f"no ({', '.join(broken)})",
        "signed by": f"{signature.get('common_name', '?')} of {signature.get('issuer', '?')}",
        "issuer": "in no list of trust" if UNTRUSTED in codes else "trusted",
        "source": ", ".join(filter(None, actions)) or "not stated",
    }


def _statement(source_type: SourceType) -> dict[str, Any]:
    program = {"name": "Latentrt", "version": program_version()}
    created = {
        "action": "c2pa.created",
        "digitalSourceType": source_type_url(source_type),
        "softwareAgent": program,
    }
    return {
        "claim_generator_info": [program],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [created]}}],
    }


def _kind(data: bytes) -> str:
    if data.startswith(b"\x89PNG"):
        return "PNG"
    return "JPEG" if data.startswith(b"\xff\xd8") else "WEBP"


def _pem(option: str, path: Path, wanted: bytes) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_PEM)
    except OSError as error:
        raise RequestError(f"{option} {path} cannot be read ({error.strerror})") from error
    if b"-----BEGIN " not in content or wanted + b"-----" not in content:
        raise RequestError(
            f"{option} {path} is no PEM file with a {wanted.decode().lower()}; it begins with "
            "-----BEGIN and holds what the signer's issuer gave out"
        )
    return content


def _import() -> Any:
    try:
        import c2pa
    except ImportError as error:
        raise BackendError(
            f"content credentials need c2pa-python; {install('c2pa-python', 'c2pa')}"
        ) from error
    return c2pa
