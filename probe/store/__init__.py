"""Writing so that nothing is ever half there, and going on where a run stopped.

The idea: whatever has a final name is complete. A file or a Zarr store is written under a temporary name beside its
target and renamed when all of it is on disk. So the existence of a name is the only ledger that a run needs: a part
that is there is done, a part that is not there is computed. A process may be killed at any moment; issue the same
command again and it goes on. ::

    with open_run(Path("runs/attention"), {"model": "toy", "shots": 4, "seed": 0}) as run:
        if not run.finished:
            parts = [run.part(f"{i:05d}", lambda batch=batch: measure(model, batch)) for i, batch in enumerate(batches)]
            run.finish(xr.concat(parts, "episode"))
        result = run.result()

A run directory looks like this:

=================== ================================================================================================
``run.json``        ``key`` (a hash of ``config``), ``config`` (what decides the numbers), ``stamp`` (versions, command,
                    time of the first start) and ``state`` (``running`` or ``finished``)
``parts/*.zarr``    what is done so far; deleted once the result is written
``result.zarr``     the result, an :class:`xarray.Dataset`
``.lock``           held while a process has the run open; a dead process holds nothing
anything else       written by the caller to :meth:`Run.path`: the manifest, tables, figures
=================== ================================================================================================

A run directory belongs to one configuration. Other settings are refused, and so is a directory that holds other files.
"""

from probe.store.atomic import read_zarr, write_bytes, write_json, write_text, write_zarr
from probe.store.run import Keep, Run, open_run
from probe.store.stamp import key, stamp

__all__ = [
    "Keep",
    "Run",
    "key",
    "open_run",
    "read_zarr",
    "stamp",
    "write_bytes",
    "write_json",
    "write_text",
    "write_zarr",
]
