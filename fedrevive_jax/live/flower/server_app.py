"""What Flower starts for a run: the server core behind its Grid."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedrevive_jax.live import serving
from fedrevive_jax.live.flower.link import GridLink

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs what the folder named in the run's configuration says, to its end."""
    link = GridLink(grid)
    try:
        serving.serve(Path(str(context.run_config["folder"])), link)
    finally:
        link.close()
