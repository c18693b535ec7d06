"""ONNX Runtime on the CPU."""

from typing import Any

from numpy.typing import NDArray

from engine.backends import Arrays, bind
from engine.errors import BackendError, GraphError
from engine.graphs import Graph


class OnnxRuntimeEngine:
    """A graph in an ONNX Runtime session, its weights handed over in memory."""

    def __init__(self, graph: Graph, weights: Arrays, threads: int | None) -> None:
        onnxruntime = _import()
        self._weights = bind(graph, weights)  # the session reads these arrays, it owns no copy
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        options.add_external_initializers(
            list(self._weights),
            [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in self._weights.values()],
        )
        try:
            self._session = onnxruntime.InferenceSession(
                graph.path.read_bytes(), options, providers=["CPUExecutionProvider"]
            )
        except OSError as error:
            raise GraphError(f"{graph.path} cannot be read ({error}); restore the file") from error
        except Exception as error:  # the library's own exceptions share no base of their own
            raise GraphError(
                f"ONNX Runtime cannot open {graph.path} with these weights "
                f"({_first_line(error)}); does the graph fit the model? make it anew with "
                "`python -m export MODEL`"
            ) from error
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run once; raises BackendError when the library fails, as for want of memory."""
        try:
            results = self._session.run(self._outputs, dict(inputs))
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime failed ({_first_line(error)}); is the picture too large for the "
                "memory of this machine?"
            ) from error
        return dict(zip(self._outputs, results, strict=True))


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            "the backend 'cpu' needs onnxruntime, which is not installed; "
            "install it with `pip install 'latentrt[cpu]'`"
        ) from error
    return onnxruntime


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
