"""The yardstick of `cpu_layer.py`: the experts of one token as onnxruntime runs them. It knows nothing of dynaexq."""

import numpy as np
import torch
from torch import Tensor

GROUP = 64
SESSIONS = 6  # sets of experts in turn, more than a cache holds


class OnnxExperts:
    """`top_k` gated experts a session: MatMulNBits, SiLU gate, MatMulNBits, sum. float32 rows, int8 inside."""

    def __init__(self, hidden_size: int, intermediate_size: int, top_k: int, num_threads: int):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.log_severity_level = 3
        graph = _graph(hidden_size, intermediate_size, top_k)
        self._sessions = [onnxruntime.InferenceSession(graph, options) for _ in range(SESSIONS)]
        codes_and_scales = 3 * hidden_size * intermediate_size * (4 + 32 / GROUP) / 8
        self._nbytes, self._turn = round(top_k * codes_and_scales), 0

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self._turn += 1
        session = self._sessions[self._turn % SESSIONS]
        (output,) = session.run(None, {"x": hidden_states.float().numpy()})
        return torch.from_numpy(output)

    def bytes_read(self, top_k_index: Tensor) -> int:
        return self._nbytes


def onnx_experts(model) -> OnnxExperts | None:
    """The yardstick for `cpu_layer.Model`, or None, said once, where it is not installed."""
    try:
        import onnx  # noqa: F401

        return OnnxExperts(model.hidden_size, model.intermediate_size, model.top_k, torch.get_num_threads())
    except ImportError as missing:
        print(f"without the yardstick: {missing}; pip install onnx onnxruntime")
        return None


def _graph(hidden_size: int, intermediate_size: int, top_k: int) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes, constants, outputs = [], [], []

    def matmul(x: str, name: str, rows: int, columns: int) -> str:
        codes = rng.integers(0, 256, (rows, columns // GROUP, GROUP // 2), dtype=np.uint8)
        scales = np.full(rows * columns // GROUP, 0.005, np.float32)
        constants.extend([numpy_helper.from_array(codes, f"{name}.w"), numpy_helper.from_array(scales, f"{name}.s")])
        attributes = {"K": columns, "N": rows, "bits": 4, "block_size": GROUP, "accuracy_level": 4}
        inputs = [x, f"{name}.w", f"{name}.s"]
        nodes.append(helper.make_node("MatMulNBits", inputs, [name], domain="com.microsoft", **attributes))
        return name

    for expert in range(top_k):
        gate = matmul("x", f"gate{expert}", intermediate_size, hidden_size)
        up = matmul("x", f"up{expert}", intermediate_size, hidden_size)
        nodes.append(helper.make_node("Sigmoid", [gate], [f"sigmoid{expert}"]))
        nodes.append(helper.make_node("Mul", [gate, f"sigmoid{expert}"], [f"silu{expert}"]))
        nodes.append(helper.make_node("Mul", [f"silu{expert}", up], [f"hidden{expert}"]))
        outputs.append(matmul(f"hidden{expert}", f"down{expert}", hidden_size, intermediate_size))
    nodes.append(helper.make_node("Sum", outputs, ["y"]))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", hidden_size]) for name in "xy")
    graph = helper.make_graph(nodes, "experts", [x], [y], constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
