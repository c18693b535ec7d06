"""ONNX Runtime with its WebGPU provider, without the provider: the processor's stands for it.

Buffers lie in the processor's memory; sessions are the processor's, of the models that the provider
would be given, so what is computed is real.
"""

from types import SimpleNamespace

import onnxruntime

PROVIDER = "WebGpuExecutionProvider"


class OrtValue(onnxruntime.OrtValue):
    """A value whose memory is never the provider's."""

    @classmethod
    def ortvalue_from_shape_and_type(cls, shape, element_type, *, memory_info):
        assert memory_info == "its memory", "not on the device"
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, element_type)


class SessionOptions(onnxruntime.SessionOptions):
    """Options that remember what the provider was told."""

    def add_provider_for_devices(self, devices, options):
        self.devices, self.provider_options = devices, options


class Library:
    """The module `onnxruntime`.

    has_float16: whether the GPU has it; lacking: what opening a session says, "" where it opens
    attention: by what its own attention's results are multiplied
    opened: how many sessions were opened
    """

    def __init__(self, *, has_float16=True, lacking="", attention=1.0):
        self.has_float16, self.lacking, self.attention = has_float16, lacking, attention
        self.opened = 0
        self.OrtValue, self.SessionOptions = OrtValue, SessionOptions
        self.OrtDeviceMemoryType = onnxruntime.OrtDeviceMemoryType
        self.OrtHardwareDeviceType = onnxruntime.OrtHardwareDeviceType

    def copy_tensors(self, sources, targets):
        for source, target in zip(sources, targets, strict=True):
            assert source.shape() == target.shape()
            target.update_inplace(source.numpy())

    def InferenceSession(self, data, options):  # noqa: N802
        assert options.devices, "no device was chosen"
        if self.lacking:
            raise RuntimeError(self.lacking)
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        self.opened += 1
        names = {given.name: given.type for given in session.get_inputs()}
        if not self.has_float16 and "tensor(float16)" in names.values():
            raise RuntimeError("Program Add requires f16 but the device does not support it.")
        if set(names) == {"q", "k", "v"}:
            wrong = self.attention
            return SimpleNamespace(
                run=lambda outputs, given: [wrong * out for out in session.run(outputs, given)]
            )
        return session


def ep_device(*, kind=onnxruntime.OrtHardwareDeviceType.GPU, **metadata):
    """Describe a GPU as the library does."""
    hardware = SimpleNamespace(type=kind, metadata=metadata)
    return SimpleNamespace(ep_name=PROVIDER, device=hardware, memory_info=lambda kind: "its memory")
