"""Makes what a federation between machines needs to trust each other.

On the server:      python -m experiments.keys --out=certificates --hosts=fl.example.org
On every client:    python -m experiments.keys --out=me --client

The server's ca.crt goes to the clients. Each client's me.pub goes to the server; `me` stays where
it is.
"""

from pathlib import Path

from absl import flags

from experiments import flags as config_flags
from fedrevive_jax.config import whole_path
from fedrevive_jax.errors import ConfigError, UserError

OUT = flags.DEFINE_string("out", None, "folder of the server's files, or a client's key")
HOSTS = flags.DEFINE_list("hosts", [], "names or addresses by which clients know the server")
CLIENT = flags.DEFINE_bool("client", False, "a client's pair of keys, not a server's certificates")


def main() -> None:
    if not OUT.value:
        raise ConfigError("out", OUT.value or "", "must name what is to be made")
    if CLIENT.value and HOSTS.value:
        raise ConfigError("hosts", ",".join(HOSTS.value), "are for the server's certificates")
    try:
        from fedrevive_jax.live import keys
    except ModuleNotFoundError as error:
        raise UserError(f"needs {error.name}: python -m pip install -e '.[live]'") from None
    path = Path(whole_path("out", OUT.value))
    if CLIENT.value:
        keys.make_client(path)
        print(f"{path} stays here; {path}.pub is for the server")
        return
    keys.make_server(path, HOSTS.value)
    print(f"{path / keys.AUTHORITY} is for the clients; all else in {path} stays here")


if __name__ == "__main__":
    config_flags.run(main)
