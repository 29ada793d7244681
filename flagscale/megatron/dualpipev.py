"""DualPipeV's placement: each pipeline rank holds two chunks of the model, laid out in a V.

With P ranks the layers are cut into 2 P chunks. Going down, rank r holds chunk r; going up again,
chunk 2 P - 1 - r. So rank 0 has both the first layers, with the embedding, and the last, with the
output layer (DeepSeek's DualPipe, in its V-shaped form). Megatron-Core 0.16.1 can build these
chunks, because it asks a layout object where layers go; it has no schedule that runs them.
"""

from __future__ import annotations

from megatron.core import parallel_state
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from flagscale.megatron.arguments import Arguments


class DualPipeVLayout(PipelineParallelLayerLayout):
    """Answers Megatron-Core's questions about layers for one of a rank's two chunks.

    It stands in `TransformerConfig.pipeline_model_parallel_layout`. To Megatron-Core it looks like
    a pipeline that is not interleaved: which chunk is meant is fixed here, not by `vp_stage`.
    """

    def __init__(self, num_layers: int, pipeline_model_parallel_size: int, first: bool) -> None:
        """Lay the layers out.

        Args:
            num_layers: of the whole model; a multiple of twice the ranks.
            pipeline_model_parallel_size: ranks.
            first: whether the chunk is the rank's first (going down the V).
        """
        chunks = 2 * pipeline_model_parallel_size
        self._chunk_layers = num_layers // chunks
        stages = [[LayerType.decoder] * self._chunk_layers for _ in range(chunks)]
        stages[0].insert(0, LayerType.embedding)
        stages[-1].append(LayerType.loss)
        super().__init__(stages, pipeline_model_parallel_size)
        self.first = first
        self.layout = [[stages[r], stages[-1 - r]] for r in range(pipeline_model_parallel_size)]
        # Else Megatron-Core takes the two chunks for interleaved ones, and wants a vp_stage.
        self.virtual_pipeline_model_parallel_size = 1

    def chunk(self, pp_rank: int | None = None) -> list[LayerType]:
        """What the chunk of a rank (default: this process') is made of, in order."""
        stages: list[LayerType] = self.layout[_rank(pp_rank)][0 if self.first else 1]
        return stages

    def get_num_layers_to_build(
        self,
        layer_type: LayerType = LayerType.decoder,
        vp_stage: int | None = None,
        pp_rank: int | None = None,
    ) -> int:
        """How many layers of a type the chunk has."""
        return self.chunk(pp_rank).count(layer_type)

    def get_layer_offset(
        self,
        layer_type: LayerType = LayerType.decoder,
        vp_stage: int | None = None,
        pp_rank: int | None = None,
    ) -> int:
        """How many layers of a type come before the chunk."""
        rank, size = _rank(pp_rank), self.pipeline_model_parallel_size
        position = rank if self.first else 2 * size - 1 - rank
        down = [stages[0] for stages in self.layout]
        up = [stages[1] for stages in reversed(self.layout)]
        return sum(chunk.count(layer_type) for chunk in (down + up)[:position])


def dualpipev_layout(
    args: Arguments, pre_process: bool, post_process: bool, vp_stage: int | None, first: bool
) -> DualPipeVLayout:
    """The layout of the chunk that the model provider is asked for.

    Args:
        args: with `use_dualpipev`.
        pre_process: as the model provider's.
        post_process: as the model provider's.
        vp_stage: as the model provider's.
        first: whether the chunk is the rank's first.

    Raises:
        ValueError: DualPipeV cannot place such a model, or the chunk has other ends than the ones
            asked for.
    """
    size = args.parallelism.pipeline_model_parallel_size
    architecture = args.shape.architecture
    refused = {
        f"pipeline_model_parallel_size={size}: needs at least 2 ranks": size < 2,
        f"vp_stage={vp_stage}: its two chunks are no virtual stages; must be None": (
            vp_stage is not None
            or args.parallelism.virtual_pipeline_model_parallel_size is not None
        ),
        "use_legacy_models=True: legacy models know no layout; must be False": (
            args.use_legacy_models
        ),
        "untie_embeddings_and_output_weights=False: embedding and output layer are in different "
        "chunks of rank 0, and Megatron-Core ties those of the first and last rank; must be True": (
            not args.shape.untie_embeddings_and_output_weights
        ),
        f"mtp_num_layers={architecture.mtp_num_layers}: Megatron-Core builds these on the last "
        "rank, the last layers are on rank 0; must be None": (
            architecture.mtp_num_layers is not None
        ),
        f"num_layers={args.shape.num_layers}: must be a multiple of 2 x {size} ranks": (
            args.shape.num_layers % (2 * size) != 0
        ),
    }
    for reason, applies in refused.items():
        if applies:
            raise ValueError(f"use_dualpipev=True with {reason}")
    layout = DualPipeVLayout(args.shape.num_layers, size, first)
    chunk = layout.chunk()
    ends = (LayerType.embedding in chunk, LayerType.loss in chunk)
    if (pre_process, post_process) != ends:
        raise ValueError(
            f"pre_process={pre_process}, post_process={post_process}: DualPipeV's "
            f"{'first' if first else 'second'} chunk of pipeline rank {_rank(None)} has "
            f"pre_process={ends[0]}, post_process={ends[1]}; rank 0 holds embedding and output "
            "layer"
        )
    return layout


def _rank(pp_rank: int | None) -> int:
    return parallel_state.get_pipeline_model_parallel_rank() if pp_rank is None else pp_rank
