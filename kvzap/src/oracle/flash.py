"""flash.py: writes flash.pt, a TorchScript program of one call that tch has no name for. Needs no torch."""

import pathlib
import zipfile

PROGRAM = """class Attended(Module):
  __parameters__ = []
  __buffers__ = []
  training : bool
  def forward(self: __torch__.Attended,
    queries: Tensor,
    keys: Tensor,
    values: Tensor) -> Tuple[Tensor, Tensor]:
    _0 = torch._scaled_dot_product_flash_attention(queries, keys, values, 0., True)
    mixed, sums, _1, _2, _3, _4, _5, _6, _7, = _0
    return (mixed, sums)
"""
# Pickles: an object of that class, and an empty tuple.
OBJECT = b"\x80\x02c__torch__\nAttended\nq\x00)\x81}(X\x08\x00\x00\x00trainingq\x01\x89ub."
FILES = {
    "data.pkl": OBJECT,
    "code/__torch__.py": PROGRAM.encode(),
    "constants.pkl": b"\x80\x02).",
    "version": b"3\n",
}

with zipfile.ZipFile(pathlib.Path(__file__).with_suffix(".pt"), "w") as archive:
    for name, data in FILES.items():
        archive.writestr(zipfile.ZipInfo(f"flash/{name}"), data)
