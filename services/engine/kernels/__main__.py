"""`python -m services.engine.kernels`: compiles every kernel now, at installation, so that no start has to."""

from __future__ import annotations

import services.engine.attention.paged_kernels
import services.engine.model.linear.block_kernels
import services.engine.model.linear.largest_kernels
import services.engine.model.linear.tiled_kernels
import services.engine.model.ops_kernels
from services.engine.kernels.team import addresses, team_of

if __name__ == "__main__":
    # Their kernels are compiled on import; a team compiles what it calls when it is made and used.
    _ = (
        services.engine.attention.paged_kernels,
        services.engine.model.linear.block_kernels,
        services.engine.model.linear.largest_kernels,
        services.engine.model.ops_kernels,
    )
    team = team_of(2)
    team.run(services.engine.model.linear.tiled_kernels.multiply_floats, addresses(*[0] * 7), 2)
