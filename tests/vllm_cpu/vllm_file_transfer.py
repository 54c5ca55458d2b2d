"""A file in the place of NCCL, which needs GPUs: a transfer of weights to a vLLM server on a CPU.

The trainer writes the tensors to a safetensors file and posts its path; the server loads it. All else of TRL's client and of vLLM's
server is as it is with NCCL: the same requests in the same order.
"""

import os
from dataclasses import dataclass

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """It holds what the server's endpoint asks of every engine."""

    rank_offset: int = 1
    world_size: int = 2


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """It tells of one transfer of weights."""

    path: str
    names: list | None = None


class FileEngine(WeightTransferEngine):
    """The server's side."""

    init_info_cls, update_info_cls = FileInitInfo, FileUpdateInfo

    def init_transfer_engine(self, init_info):
        pass

    def start_weight_update(self):
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def finish_weight_update(self):
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info):
        # As the base class does, but without its `torch.accelerator.synchronize()`
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info):
        from safetensors.torch import load_file

        self.model.load_weights(list(load_file(update_info.path).items()))

    def shutdown(self):
        pass


def send_by_file(client_class, folder):
    """
    Let TRL's client send weights by a file.

    Args:
        client_class (`type`): `trl.generation.vllm_client.VLLMClient`.
        folder (`str`): Where the file is written.
    """

    def init_communicator(self, device=0):
        assert self.get_server_info()["weight_transfer_config"] is not None
        assert self.get_world_size() == 1
        self._post(f"{self.base_url}/init_weight_transfer_engine", json={"init_info": {}})

    def update_named_params(self, metadata, named_params):
        from safetensors.torch import save_file

        path = os.path.join(folder, "weights.safetensors")
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in named_params}
        assert [name for name, _, _ in metadata] == list(tensors)
        save_file(tensors, path)
        self._start_weight_update()
        self._post(f"{self.base_url}/update_weights", json={"update_info": {"path": path, "names": list(tensors)}})
        self._finish_weight_update()

    client_class.init_communicator, client_class.update_named_params = init_communicator, update_named_params
