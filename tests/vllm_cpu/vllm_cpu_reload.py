"""A plugin of vLLM that lets weights be loaded again on a CPU, as they are on a GPU after each step of a training run.

After loading, vLLM's CPU backend packs the weight of each linear layer for oneDNN and leaves an empty parameter without
`weight_loader` in its place; of a tied `lm_head` it packs a copy, which later loads do not reach. With the plugin the layers keep
their weights and multiply by `torch.nn.functional.linear`. vLLM calls `register` in each of its processes before it loads a model.
"""

import torch


def register():
    import vllm.model_executor.layers.utils as utils
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    utils.dispatch_cpu_unquantized_gemm = keep_weight
    if "file" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("file", "vllm_file_transfer", "FileEngine")


def keep_weight(layer, remove_weight):
    """Take the place of vLLM's function of this signature, which packs the weight of a layer."""
    if layer.weight.is_meta or layer.weight.ndim == 2:
        layer.cpu_linear = torch.nn.functional.linear
