"""Settings of the GPU kernels; ServerConfig inherits them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class GpuConfig(BaseModel):
    """How the fused backend uses a GPU."""

    model_config = ConfigDict(frozen=True)

    cuda_graphs: bool = Field(
        default=True,
        description="replay decode steps as CUDA graphs, recorded at start (off: kernel by kernel, "
        "slower; a way round a driver that cannot record them)",
    )
    kv_cache_dtype: Literal["auto", "int8"] = Field(
        default="auto",
        description="auto (what is computed in) or int8: twice the tokens in the same memory, "
        "slightly rounded; of the fused backend on a GPU",
    )
