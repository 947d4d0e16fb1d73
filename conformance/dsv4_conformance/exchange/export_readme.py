"""The README of an exported directory."""

README = """# Exported op cases

Inputs and expected outputs of the operations that DeepSeek-V4 is made of, for a program in any language. For every
case: read its inputs, compute, write its
outputs, then `dsv4 conformance judge THIS RESULTS`.

    manifest.json                   everything below, and the contract of every op: signature, axes, formula
    inputs/OP/CASE.safetensors      operands
    expected/OP/CASE.safetensors    want.NAME, and for rounded outputs budget.NAME and spread.NAME (float64)
    RESULTS/OP/CASE.safetensors     what you write: one tensor per output, named as in the manifest

`manifest.json`: `numerics` (native: BF16 between operations; float32, float64: exact arithmetic), and `cases`, each
with

- `id`, `op`, `level`, `seed`; `inputs`, `expected`, `results`: file names (`results` relative to RESULTS);
- `outputs`: in order, `name`, `dtype`, `shape`, and how it is `judged`:
  `exact`: every bit (NaN equals NaN, -0 equals 0); `rounded`: every element x with |x - want| <= budget, NaN exactly
  where `want` has it, and no bias
  (truncation shows); `discrete`: ids or picks, re-scored by `judge`: another pick is wrong only if its score is worse
  than both scores' budgets allow.
  An operand that the op changes (`cache`) is an output under its own name: give it back as it is after the call;
- `call`: `scalars`, and `operands` by name. An operand is null (absent) or has a `kind`:
  - `array`: `tensor` names it in the inputs file;
  - `scaled`: a quantised weight [out, in]. `data` are bytes: E4M3 codes [out, in] (`format` e4m3), or packed E2M1 [out,
  in / 2], the even column in the low
    nibble (e2m1). `scale` are E8M0 bytes, value 2^(byte - 127): one per 128 x 128 block [ceil(out / 128), ceil(in /
    128)] (e4m3), or one per 32 channels of a
    row [out, in / 32] (e2m1);
  - `experts`: `count` experts, of which those in `used` are stored, stacked in that order along the first axis of
  `data` and `scale`; the op touches no other;
  - `list`: `parts`, each an operand.
  A scalar `layout` says how cache rows are stored (`kind`, `dim`, `rope_dim`): `plain`, `dim` elements; `kv`, E4M3
  codes of the first dim - rope_dim channels,
  one E8M0 byte per 64 of them, padded with zeros to a multiple of 8 bytes, then rope_dim BF16 values; `key`, E2M1
  pairs, then one E8M0 byte per 32 channels.

safetensors dtypes: BF16, F32, F64, I32, I64, U8 (codes, packed pairs and E8M0 scales are U8). A safetensors file is 8
bytes of little-endian header length, a JSON
header (name: dtype, shape, data_offsets from the header's end), and the tensors' bytes in C order.

`left_out` in the manifest: cases about strided memory, which a file cannot hold, and one whose cache passes 2^31 bytes.
"""
