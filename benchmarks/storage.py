"""Size, speed and precision of a stored label set against what a user would otherwise write.

Without ``--labels`` the rows are synthetic: no model has seen them, so bytes per token say less
than a real label set does.
"""

import harness

# isort: split
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash

from storage.keys import LabelSetSpec, sample_key
from storage.labels.topk import STEPS_PER_NAT, TopK
from storage.samples import LabelledSample
from storage.schema import labels_schema
from storage.shard import ShardFile, column_digest, encode_shard
from storage.store import LabelStore
from storage.tail import normalized_categories
from storage.testing import make_spec

VOCAB_SIZE = 49152
K = 64
SAMPLE_TOKENS = 256
QUICK_SAMPLES = 32
FULL_SAMPLES = 256
JSON_ROWS = 512
"""Rows written as JSON: its size per row settles quickly and writing it is slow."""

ZIPF_SLOPE = 1.4
NOISE_NATS = 3.4
"""Chosen for the statistics of a small real teacher on running text (top-64 mass 0.88, entropy 2.6
nats, 12.0 bit per stored id if ids were independent); these give 0.90, 2.9 and 11.9."""

SYNTHETIC_NOTE = (
    f"Input: SYNTHETIC rows, a Zipf law over {VOCAB_SIZE} ids plus independent normal noise from a "
    "seeded generator, with the top-64 mass, entropy and id frequencies of a small real teacher. "
    "Real rows share ids with their neighbours and compress differently."
)
PARQUET = "Parquet, byte stream split + zstd-1, page CRC, same 1/256 differences"


@dataclass(frozen=True)
class Input:
    """Labels to measure on."""

    samples: Sequence[LabelledSample]
    spec: LabelSetSpec
    exact: bool
    """Whether log-probs are as captured; those of a store are rounded already."""
    note: str
    ids_NK: npt.NDArray[np.int32]
    logprobs_NK: npt.NDArray[np.float32]
    log_tail_mass_N: npt.NDArray[np.float32]


def make_input(
    samples: Sequence[LabelledSample], spec: LabelSetSpec, *, exact: bool, note: str
) -> Input:
    """All rows of the samples as arrays."""
    return Input(
        samples,
        spec,
        exact,
        note,
        ids_NK=np.concatenate([sample.topk_ids_NK for sample in samples]),
        logprobs_NK=np.concatenate([sample.topk_logprobs_NK for sample in samples]),
        log_tail_mass_N=np.concatenate([sample.log_tail_mass_N for sample in samples]),
    )


def synthetic_sample(number: int, spec: LabelSetSpec) -> LabelledSample:
    """One response of SAMPLE_TOKENS positions, sampled from made-up distributions."""
    random = np.random.default_rng(number)
    zipf_V = np.float32(-ZIPF_SLOPE) * np.log(np.arange(1, VOCAB_SIZE + 1, dtype=np.float32))
    logits_RV = random.standard_normal((SAMPLE_TOKENS, VOCAB_SIZE), dtype=np.float32)
    logits_RV *= np.float32(NOISE_NATS)
    logits_RV += zipf_V
    logits_RV -= logits_RV.max(axis=1, keepdims=True)
    masses_RV = np.exp(logits_RV)
    totals_R = masses_RV.sum(axis=1, dtype=np.float64)
    logprobs_RV = (logits_RV - np.log(totals_R)[:, None]).astype(np.float32)
    entropy_R = -(masses_RV * logprobs_RV).sum(axis=1, dtype=np.float64) / totals_R

    ids_RK = np.argpartition(-logprobs_RV, K, axis=1)[:, :K].astype(np.int32)
    order_RK = np.argsort(-np.take_along_axis(logprobs_RV, ids_RK, 1), axis=1, kind="stable")
    ids_RK = np.take_along_axis(ids_RK, order_RK, 1)
    topk_RK = np.take_along_axis(logprobs_RV, ids_RK, 1)
    np.put_along_axis(masses_RV, ids_RK, 0.0, 1)
    tail_R = masses_RV.sum(axis=1, dtype=np.float64) / totals_R

    cumulative_RV = np.cumsum(np.exp(logprobs_RV, dtype=np.float64), axis=1)
    thresholds_R = random.random(SAMPLE_TOKENS) * cumulative_RV[:, -1]
    response_R = (cumulative_RV < thresholds_R[:, None]).sum(axis=1).astype(np.int32)
    token_logprob_R = logprobs_RV[np.arange(SAMPLE_TOKENS), response_R]
    prompt_P = random.integers(0, VOCAB_SIZE, size=32).astype(np.int32)
    return LabelledSample(
        key=sample_key(prompt_P, 0),
        sample_index=0,
        prompt_ids_P=prompt_P,
        response_ids_R=response_R,
        positions_N=np.arange(SAMPLE_TOKENS, dtype=np.int32),
        token_logprob_N=token_logprob_R,
        token_rank_N=(1 + (logprobs_RV > token_logprob_R[:, None]).sum(axis=1)).astype(np.int32),
        log_tail_mass_N=np.log(tail_R).astype(np.float32),
        topk_ids_NK=ids_RK,
        topk_logprobs_NK=topk_RK,
        entropy_N=entropy_R.astype(np.float32),
        finish_reason="length",
    )


def synthetic_input(num_samples: int) -> Input:
    """Checked synthetic samples."""
    spec = make_spec(k=K, vocab_size=VOCAB_SIZE)
    samples = [synthetic_sample(number, spec) for number in range(num_samples)]
    for sample in samples:
        sample.check(spec)
    return make_input(samples, spec, exact=True, note=SYNTHETIC_NOTE)


def stored_input(uri: str, key: str, num_samples: int) -> Input:
    """The first samples of a real label set; their log-probs are rounded already."""
    labels = LabelStore(uri).open(key)
    keys = list(labels.addresses())[:num_samples]
    note = f"Input: {len(keys)} samples of label set {labels.key}."
    return make_input(list(labels.read(keys)), labels.spec, exact=False, note=note)


# -- what a user would otherwise write ------------------------------------------------------------
def jsonl_bytes_per_token(data: Input) -> float:
    """One line per position in the form of vLLM's log-probs, without decoded tokens."""
    rows = list(zip(data.ids_NK[:JSON_ROWS], data.logprobs_NK[:JSON_ROWS], strict=True))
    num_bytes = 0
    for ids_K, logprobs_K in rows:
        entries = zip(ids_K.tolist(), logprobs_K.tolist(), strict=True)
        line = {
            token_id: {"logprob": logprob, "rank": rank}
            for rank, (token_id, logprob) in enumerate(entries, start=1)
        }
        num_bytes += len(json.dumps(line)) + 1
    return num_bytes / len(rows)


def torch_bytes_per_token(data: Input) -> float:
    """``torch.save`` of int64 ids and float32 log-probs."""
    sink = io.BytesIO()
    tensors = {
        "ids": torch.from_numpy(data.ids_NK.astype(np.int64)),
        "logprobs": torch.from_numpy(data.logprobs_NK),
    }
    torch.save(tensors, sink)
    return len(sink.getvalue()) / len(data.ids_NK)


def to_parquet(labels: pa.Table, data: Input) -> tuple[bytes, bytes]:
    """Scalars in one file; ids and differences, flattened, in another. Both with page CRCs."""
    steps_NK = np.rint(-data.logprobs_NK.astype(np.float64) * STEPS_PER_NAT).astype(np.int32)
    differences_NK = np.diff(steps_NK, axis=1, prepend=0)
    planes = pa.table({"ids": data.ids_NK.ravel(), "dq": differences_NK.ravel()})
    scalars = labels.select(
        [f.name for f in labels.schema if not pa.types.is_fixed_size_list(f.type)]
    )
    files = []
    for table in (scalars, planes):
        sink = io.BytesIO()
        pq.write_table(
            table,
            sink,
            compression="zstd",
            compression_level=1,
            use_dictionary=False,
            column_encoding=dict.fromkeys(table.column_names, "BYTE_STREAM_SPLIT"),
            write_page_checksum=True,
        )
        files.append(sink.getvalue())
    return files[0], files[1]


def decode_parquet(files: tuple[bytes, bytes], k: int) -> npt.NDArray[np.float32]:
    """Read both files, checksums verified; log-probs as float32[N, K]."""
    for data in files:
        table = pq.read_table(
            pa.BufferReader(data), use_threads=False, page_checksum_verification=True
        )
    table["ids"].to_numpy().reshape(-1, k)
    steps_NK = np.cumsum(table["dq"].to_numpy().reshape(-1, k), axis=1, dtype=np.int32)
    logprobs_NK: npt.NDArray[np.float32] = steps_NK.astype(np.float32) * np.float32(
        -1.0 / STEPS_PER_NAT
    )
    return logprobs_NK


# -- ours -----------------------------------------------------------------------------------------
def decode_ours(data: bytes, spec: LabelSetSpec) -> list[npt.NDArray[np.float32]]:
    """Read a labels file, everything verified; log-probs as float32[., K] by batch."""
    xxhash.xxh3_128_hexdigest(data)
    kind = TopK(spec.kind)
    found = []
    for batch in ShardFile(data, name="labels", schema=labels_schema(spec)).batches():
        found.append(kind.decode(dict(zip(batch.schema.names, batch.columns, strict=True)))[1])
    return found


def only_verify(data: bytes, batches: Sequence[pa.RecordBatch]) -> None:
    """The checks alone: file digest and the digest of every column of decoded batches."""
    xxhash.xxh3_128_hexdigest(data)
    for batch in batches:
        for column in batch.columns:
            column_digest(column)


class CountingReader(io.BytesIO):
    """A file that counts the bytes that are read from it."""

    num_read = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Read and count."""
        found = super().read(size)
        self.num_read += len(found)
        return found


def bytes_read_for(data: bytes, column: str) -> int:
    """Bytes that Arrow fetches to decode one column of every batch, footer included."""
    counter = CountingReader(data)
    index = pa.ipc.open_file(pa.BufferReader(data)).schema.get_field_index(column)
    options = pa.ipc.IpcReadOptions(included_fields=[index])
    with pa.ipc.open_file(pa.PythonFile(counter, mode="r"), options=options) as reader:
        for number in range(reader.num_record_batches):
            reader.get_batch(number)
    return counter.num_read


def kl_and_error(data: Input, decoded_NK: npt.NDArray[np.float32]) -> tuple[float, float, float]:
    """Mean and 99th percentile of KL(exact, decoded) over k + 1 categories; largest error."""
    tail_N = data.log_tail_mass_N
    exact = normalized_categories(data.logprobs_NK, tail_N)
    stored = normalized_categories(decoded_NK, tail_N)
    kl_N = (np.exp(exact) * (exact - stored)).sum(axis=1)
    error = float(np.abs(decoded_NK.astype(np.float64) - data.logprobs_NK).max())
    return float(kl_N.mean()), float(np.percentile(kl_N, 99)), error


def size_goals(data: Input, ours: float, parquet: float) -> list[harness.Goal]:
    """Bytes per token of the contenders over ours."""
    jsonl, saved = jsonl_bytes_per_token(data), torch_bytes_per_token(data)
    return [
        harness.Goal("size of the labels file", "", f"{ours:.1f} B/token", None),
        harness.Goal(
            "smaller than JSONL",
            ">= 18x",
            f"{jsonl / ours:.1f}x",
            jsonl / ours >= 18,
            f"vLLM's form {{id: {{logprob, rank}}}}: {jsonl:.0f} B/token",
        ),
        harness.Goal(
            "smaller than torch.save",
            ">= 4x",
            f"{saved / ours:.2f}x",
            saved / ours >= 4,
            f"int64 ids + float32 log-probs: {saved:.0f} B/token",
        ),
        harness.Goal(
            "smaller than Parquet",
            "",
            f"{parquet / ours:.2f}x",
            None,
            f"{PARQUET}: {parquet:.1f} B/token",
        ),
    ]


def precision_goals(data: Input, decoded_NK: npt.NDArray[np.float32]) -> list[harness.Goal]:
    """Error of what is read against what was captured."""
    if not data.exact:
        absent = harness.NOT_MEASURED
        return [
            harness.Goal("mean KL of stored labels", "<= 5e-7 nats", absent, None),
            harness.Goal("largest error of a log-prob", "<= 0.002 nats", absent, None),
        ]
    kl, kl_p99, error = kl_and_error(data, decoded_NK)
    return [
        harness.Goal(
            "mean KL of stored labels",
            "<= 5e-7 nats",
            f"{kl:.1e} nats (p99 {kl_p99:.1e})",
            kl <= 5e-7,
            "exact log-probs, k tokens and the tail",
        ),
        harness.Goal(
            "largest error of a log-prob",
            "<= 0.002 nats",
            f"{error:.5f} nats",
            error <= 0.002,
            "exact log-probs",
        ),
    ]


def speed_goals(data: Input, shard: bytes, parquet: tuple[bytes, bytes]) -> list[harness.Goal]:
    """Decode and verification in CPU seconds of one thread."""
    batches = list(ShardFile(shard, name="labels", schema=labels_schema(data.spec)).batches())
    times = harness.interleaved(
        {
            "ours": lambda: decode_ours(shard, data.spec),
            "verify": lambda: only_verify(shard, batches),
            "parquet": lambda: decode_parquet(parquet, data.spec.kind.k),
            "encode": lambda: encode_shard(data.samples, data.spec),
        },
        rounds=7,
    )
    million_tokens = len(data.ids_NK) / 1e6
    return [
        harness.Goal(
            "decode speed",
            "",
            times.ratio("parquet", "ours").text("x"),
            None,
            f"{PARQUET}: {times.rate('parquet', million_tokens).text(' M token/s')}",
        ),
        harness.Goal(
            "decode, verified", "", times.rate("ours", million_tokens).text(" M token/s"), None
        ),
        harness.Goal("encode", "", times.rate("encode", million_tokens).text(" M token/s"), None),
        harness.Goal(
            "share of checksums in decoding",
            "",
            times.ratio("verify", "ours").text("", digits=3),
            None,
            "file digest and a digest per column and batch",
        ),
    ]


def main() -> int:
    """Measure, print the table and write the page."""
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--labels", nargs=2, metavar=("STORE", "KEY"), help="a real label set")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    num_samples = QUICK_SAMPLES if arguments.quick else FULL_SAMPLES
    if arguments.labels:
        uri, key = arguments.labels
        data = stored_input(uri, key, num_samples)
    else:
        data = synthetic_input(num_samples)

    shard = encode_shard(data.samples, data.spec)
    labels = ShardFile(shard.labels, name="labels", schema=labels_schema(data.spec)).table()
    parquet = to_parquet(labels, data)
    decoded_NK = np.concatenate(decode_ours(shard.labels, data.spec))
    np.testing.assert_array_equal(decode_parquet(parquet, data.spec.kind.k), decoded_NK)
    share = bytes_read_for(shard.labels, "entropy") / len(shard.labels)
    goals = [
        *size_goals(
            data, len(shard.labels) / shard.num_rows, sum(map(len, parquet)) / shard.num_rows
        ),
        *precision_goals(data, decoded_NK),
        *speed_goals(data, shard.labels, parquet),
        harness.Goal("share of bytes read for `entropy`", "", f"{share:.3f}", None, "whole file"),
    ]
    mass = float(np.exp(data.logprobs_NK.astype(np.float64)).sum(axis=1).mean())
    shape = f"{shard.num_rows} rows, k = {data.spec.kind.k}, mean top-k mass {mass:.3f}."
    return harness.report(
        goals, notes=[data.note, shape, "Sizes: scalars included in ours and Parquet."]
    )


if __name__ == "__main__":
    sys.exit(main())
