"""A certificate that may sign content credentials, with its chain, as PEM."""

import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

KEYS = {
    "es256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "es384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ps256": lambda: rsa.generate_private_key(65537, 2048),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
}
USES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


def write_certificates(folder, kind="es256"):
    """Write a signer's certificate with its chain, and its key; returns both paths."""
    ca_key, key = KEYS["es256"](), KEYS[kind]()
    ca = _certificate("A test's root", ca_key.public_key(), "A test's root", ca_key, ca=True)
    leaf = _certificate("A test's signer", key.public_key(), "A test's root", ca_key, ca=False)
    pem = serialization.Encoding.PEM
    chain, private = folder / f"{kind}-chain.pem", folder / f"{kind}-key.pem"
    chain.write_bytes(leaf.public_bytes(pem) + ca.public_bytes(pem))
    form = serialization.PrivateFormat.PKCS8
    private.write_bytes(key.private_bytes(pem, form, serialization.NoEncryption()))
    return chain, private


def _certificate(subject, public_key, issuer, issuer_key, *, ca):
    def name(text):
        return x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Tests"),
                x509.NameAttribute(NameOID.COMMON_NAME, text),
            ]
        )

    now = datetime.datetime.now(datetime.UTC)
    wanted = {"key_cert_sign", "crl_sign"} if ca else {"digital_signature"}
    made = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca, None), critical=True)
        .add_extension(x509.KeyUsage(**{use: use in wanted for use in USES}), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )
    if not ca:
        made = made.add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False
        ).add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
    return made.sign(issuer_key, hashes.SHA256())
