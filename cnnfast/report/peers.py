"""What else a user could run a network with, where it is installed: torch.compile with freezing, OpenVINO, ONNX Runtime.

Each takes a model in evaluation and an input, and returns a function that runs it on that input; ImportError where the
package is missing. All get torch's thread count, and the precision of the model's dtype explicitly (OpenVINO else takes
bf16 on processors that have it). Weights are frozen, as in :func:`cnnfast.fuse`.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

Peer = Callable[[torch.nn.Module, torch.Tensor], Callable[[], Any]]


def compiled(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    """``torch.compile`` with Inductor's freezing, which folds batch norm and packs weights; channels_last."""
    import torch._inductor.config

    images = x.contiguous(memory_format=torch.channels_last)
    network = torch.compile(model.to(memory_format=torch.channels_last), dynamic=False)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        network(images)

    def run() -> Any:
        with torch.no_grad():
            return network(images)

    return run


def openvino(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    """OpenVINO's CPU plugin, tuned for latency.

    16-bit networks are converted in fp32 and computed in their own precision, which is how OpenVINO has it; images and
    result are fp32.
    """
    import openvino

    precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[x.dtype]
    model, x = model.float(), x.float()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        converted = openvino.convert_model(model, example_input=x)
    converted.reshape(list(x.shape))
    network = openvino.Core().compile_model(converted, "CPU", {
        "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
    })  # fmt: skip
    request, images = network.create_infer_request(), x.contiguous().numpy()
    request.set_input_tensor(openvino.Tensor(images, shared_memory=True))

    def run() -> Any:
        assert images is not None  # they are OpenVINO's only as long as they are ours
        request.infer()
        return torch.from_numpy(request.get_output_tensor(0).data)

    return run


def onnxruntime(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    """ONNX Runtime's CPU provider, with all graph optimisations."""
    import onnx  # noqa: F401  (the exporter's)
    import onnxruntime

    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), file, dynamo=False, input_names=["x"])  # type: ignore[arg-type]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    images = {"x": x.contiguous().numpy()}
    return lambda: torch.from_numpy(session.run(None, images)[0])


PEERS: Mapping[str, Peer] = MappingProxyType(
    {"torch.compile": compiled, "OpenVINO": openvino, "ONNX Runtime": onnxruntime}
)
