"""Settings of the GPU kernels; ServerConfig inherits them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class GpuConfig(BaseModel):
    """How the fused backend uses a GPU."""

    model_config = ConfigDict(frozen=True)

    cuda_graphs: bool = Field(
        default=True,
        description="replay decode steps as CUDA graphs, recorded at start (off: kernel by kernel, "
        "slower; a way round a driver that cannot record them)",
    )
