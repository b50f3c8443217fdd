"""An ONNX file as a module, so that what calls, times and measures models takes it too."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pykd.errors import ArtifactError

#: What a file that `pykd.export` wrote may take, by the names that models have for it.
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids", "pixel_values")


def session_options(threads: int | None = None) -> Any:
    """Options of an ONNX Runtime session that shares its cores with torch: `threads`, or as many as torch has.

    Its threads sleep between calls. By default they spin, and whatever torch computes next in the same process then
    waits for the cores.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


class OnnxModel(nn.Module):
    """Logits from an ONNX file by ONNX Runtime on the CPU.

    path: the file. threads: of ONNX Runtime; None for as many as torch has. Raises ArtifactError for a file that ONNX
    Runtime does not load.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = None) -> None:
        super().__init__()
        import onnxruntime

        try:
            self.session = onnxruntime.InferenceSession(
                path, session_options(threads), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions share no public base class
            text = " ".join(str(error).split())[:300]
            raise ArtifactError(
                f"{path} is no file that ONNX Runtime loads ({text}); export the model again."
            ) from error
        self.names = [value.name for value in self.session.get_inputs()]
        self.output_names = [value.name for value in self.session.get_outputs()]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> Tensor:
        given = (input_ids, attention_mask, token_type_ids, decoder_input_ids, pixel_values)
        return self.outputs(dict(zip(INPUTS, given, strict=True)))[self.output_names[0]]

    def outputs(self, batch: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """All outputs by name: logits first, of a router also what it chose."""
        feed: dict[str, Any] = {}
        for name in self.names:
            value = batch.get(name)
            if value is None:
                raise ArtifactError(
                    f"the ONNX file takes {', '.join(self.names)}, but there is no {name} in the batch."
                )
            feed[name] = value.detach().cpu().numpy()
        found = self.session.run(self.output_names, feed)
        return {name: torch.from_numpy(value) for name, value in zip(self.output_names, found, strict=True)}
