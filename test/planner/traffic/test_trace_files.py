"""Trace files of every format, good and bad, and the published traces where they are present."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import crosspool
import numpy as np
import pytest
from crosspool.config.errors import ConfigError
from crosspool.planner.traffic import trace_columns
from crosspool.planner.traffic.lengths import PUBLISHED
from crosspool.planner.traffic.service_time import DecodeSpeed
from crosspool.planner.traffic.trace_files import FORMATS, read_trace
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from benchmark.made_trace import Load, generate, write_trace

DATA = Path(__file__).parents[4] / "shared" / "data"
TOKENIZER = Path(crosspool.__file__).parent / "demo" / "tiny-qwen3-moe"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
PLAIN = "prompt_tokens,output_tokens\n"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="no traces beside the repository")


def _file(folder: Path, text: str | bytes, name: str = "trace") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@needs_data
@pytest.mark.parametrize(
    ("name", "requests", "rate", "means", "gap_cv"),
    [("conv", 19366, 5.53, (1155, 211), 1.09), ("code", 8819, 2.57, (2048, 28), 13.2)],
)
def test_azure_traces_have_their_published_statistics(
    name: str, requests: int, rate: float, means: tuple[int, int], gap_cv: float
) -> None:
    trace = read_trace(DATA / f"azure_llm_2023_{name}.csv")
    assert len(trace) == requests
    assert trace.rate == pytest.approx(rate, abs=0.005)
    assert (trace.prompt.mean(), trace.output.mean()) == pytest.approx(means, abs=0.5)
    assert trace.arrival is not None
    gaps = np.diff(trace.arrival)
    assert gaps.std() / gaps.mean() == pytest.approx(gap_cv, abs=0.05)
    law = PUBLISHED["azure-conversation" if name == "conv" else "azure-code"]
    for tokens, fit in ((trace.prompt, law.prompt), (trace.output, law.output)):
        assert np.log(tokens).mean() == pytest.approx(fit.mu, abs=0.01)
        assert np.log(tokens).std() == pytest.approx(fit.sigma, abs=0.01)


@needs_data
def test_plain_csv_of_lengths() -> None:
    trace = read_trace(DATA / "sharegpt_gpt4_qwen3_lengths.csv")
    assert (len(trace), trace.arrival) == (300, None)
    assert trace.prompt.mean() == pytest.approx(862, abs=0.5)
    assert np.percentile(trace.prompt, 99) == pytest.approx(2768, abs=40)


@needs_data
def test_azure_is_read_as_the_csv_module_and_datetime_read_it() -> None:
    file = DATA / "azure_llm_2023_code.csv"
    trace = read_trace(file, "azure")
    with file.open() as stream:
        rows = list(csv.DictReader(stream))
    assert trace.prompt.tolist() == [int(row["ContextTokens"]) for row in rows]
    assert trace.output.tolist() == [int(row["GeneratedTokens"]) for row in rows]
    times = [np.datetime64(row["TIMESTAMP"]) for row in rows]
    expected = [(t - times[0]) / np.timedelta64(1, "s") for t in times]
    np.testing.assert_allclose(trace.arrival, expected, atol=1e-9)


def test_azure(tmp_path: Path) -> None:
    text = AZURE + "2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:47.6805900,9,1\n\n"
    trace = read_trace(_file(tmp_path, b"\xef\xbb\xbf" + text.encode()))
    np.testing.assert_allclose(trace.arrival, [0.0, 1.0], atol=1e-9)
    assert trace.prompt.tolist() == [374, 9]
    assert trace.output.tolist() == [44, 1]
    assert (trace.seconds, trace.rate, trace.notes) == (1.0, 2.0, ())
    utc = AZURE + "2024-05-10 00:00:00.009930+00:00,1,2\n2024-05-10T00:00:02.009930Z,3,4"
    np.testing.assert_allclose(read_trace(_file(tmp_path, utc)).arrival, [0.0, 2.0])


def test_mooncake(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 500, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]},
        {"timestamp": 3500, "input_length": 7, "output_length": 1, "hash_ids": []},
    ]
    trace = read_trace(_file(tmp_path, "\n".join(map(json.dumps, rows))))
    assert trace.arrival is not None
    assert trace.arrival.tolist() == [0.0, 3.0]
    assert (trace.prompt.tolist(), trace.output.tolist()) == ([6758, 7], [500, 1])


def test_plain_csv_takes_all_five_columns_in_any_order(tmp_path: Path) -> None:
    text = 'service_seconds,"model",output_tokens,extra,prompt_tokens,arrival\n'
    text += '2.5,"a,b",7,x,5,10\n1e-3,c,8,,6,12.5\n'
    trace = read_trace(_file(tmp_path, text))
    assert (trace.prompt.tolist(), trace.output.tolist()) == ([5, 6], [7, 8])
    assert trace.arrival is not None and trace.service is not None
    assert (trace.arrival.tolist(), trace.service.tolist()) == ([0.0, 2.5], [2.5, 0.001])
    assert trace.model == ["a,b", "c"]


def test_jsonl_optional_fields_follow_the_first_line(tmp_path: Path) -> None:
    lines = [
        '{"prompt_tokens": 3, "output_tokens": 4}',
        "",
        '{"output_tokens": 2, "prompt_tokens": 1}',
    ]
    trace = read_trace(_file(tmp_path, "\n".join(lines)))
    assert (trace.prompt.tolist(), trace.arrival, trace.model, trace.service) == (
        [3, 1],
        None,
        None,
        None,
    )
    with pytest.raises(ConfigError, match="no arrival times"):
        _ = trace.rate


def test_disorder_is_sorted_and_empty_requests_left_out(tmp_path: Path) -> None:
    text = (
        "model,arrival,prompt_tokens,output_tokens\na,5,1,1\nb,2,2,2\nc,2,3,3\nd,9,0,4\ne,1,4,0\n"
    )
    trace = read_trace(_file(tmp_path, text))
    assert trace.model == ["b", "c", "a"]
    assert trace.arrival is not None
    assert trace.arrival.tolist() == [0.0, 0.0, 3.0]
    assert trace.prompt.tolist() == [2, 3, 1]
    assert len(trace.notes) == 2
    assert trace.notes[0].startswith("2 of 5 requests have no prompt or no output")
    assert trace.notes[1] == "arrival times went backwards 1 times and were sorted"


def _conversation(*turns: str) -> dict[str, list[dict[str, str]]]:
    return {"conversations": [{"from": "either", "value": text} for text in turns]}


SHAREGPT = [
    _conversation("What is a pool?" * 5, "Water."),
    _conversation("Alone"),
    _conversation("Hello there, you", " "),
    _conversation("a b c d", "é" * 40, "more"),
]


def test_sharegpt_estimates_by_characters_and_says_so(tmp_path: Path) -> None:
    trace = read_trace(_file(tmp_path, json.dumps(SHAREGPT, indent=1)))
    assert trace.prompt.tolist() == [19, 2]
    assert trace.output.tolist() == [2, 10]
    assert trace.notes == ("tokens are estimated at 4 characters each",)


def test_sharegpt_counts_with_a_tokenizer_as_transformers_does(tmp_path: Path) -> None:
    file = _file(tmp_path, json.dumps(SHAREGPT))
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    turns = [SHAREGPT[number]["conversations"][:2] for number in (0, 3)]
    expected = [[len(tokenizer(turn["value"]).input_ids) for turn in pair] for pair in turns]
    for path in (TOKENIZER, TOKENIZER / "tokenizer.json"):
        trace = read_trace(file, tokenizer=path)
        assert np.stack([trace.prompt, trace.output], axis=1).tolist() == expected
        assert trace.notes == ()
    with pytest.raises(ConfigError, match=r"nowhere.*tokenizer\.json"):
        read_trace(file, tokenizer=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(file, tokenizer=file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "trace: is empty"),
        ("\n", "is not the beginning of a trace"),
        ("a,b\n1,2\n", "trace:1: 'a,b' is not the beginning of a trace"),
        (b"\x89PNG\r\n", "is not the beginning of a trace"),
        ("{]", "trace:1: is not valid JSON"),
        (AZURE, "trace: has no requests"),
        (PLAIN + "0,5\n", "no request has both"),
        (AZURE + "2023-11-16 18:15:46,1,1\n" * 15 + "2023-11-16 18:15:46,abc,1\n",
         "trace:17: ContextTokens: 'abc' is not a whole number"),
        (AZURE + "2023-11-16 18:15:46,1.5,1\n",
         "trace:2: ContextTokens: '1.5' is not a whole number"),
        (AZURE + "2023-11-16 18:15:46,1,\n", "trace:2: GeneratedTokens: '' is not a whole number"),
        (AZURE + "2023-11-16 18:15:46,1,-2\n", "trace:2: GeneratedTokens: '-2' is negative"),
        (AZURE + "2023-11-16 18:15:46,10000001,2\n", "is more than 10000000 tokens"),
        (AZURE + "2023-11-16 18:15:46," + "9" * 30 + ",2\n", "is more than 10000000 tokens"),
        (AZURE + "2023-11-16 18:15:46," + "9" * 5000 + ",2\n", "trace:2: ContextTokens: '999"),
        (AZURE + "yesterday,1,2\n", "trace:2: TIMESTAMP: 'yesterday' is not a UTC time"),
        (AZURE + "2023-11-16 18:15:46-05:00,1,2\n", "trace:2: TIMESTAMP"),
        (AZURE + ",1,2\n", "trace:2: TIMESTAMP: '' is not a UTC time"),
        (AZURE + "\n2023-11-16 18:15:46,1\n", "trace:3: 2 fields, where the header has 3"),
        (PLAIN + "1,2,3\n", "trace:2: 3 fields, where the header has 2"),
        (PLAIN.encode() + b"1,\xff\n", "trace:2: is not UTF-8"),
        ("arrival," + PLAIN + "nan,1,2\n", "trace:2: arrival: 'nan' is not a number"),
        ("arrival," + PLAIN + "inf,1,2\n", "trace:2: arrival: 'inf' is more than"),
        ("arrival," + PLAIN + "-1,1,2\n", "trace:2: arrival: '-1' is negative"),
        ("service_seconds," + PLAIN + "0,1,2\n", "trace:2: service_seconds: '0' must be above 0"),
        ('{"prompt_tokens": 1, "output_tokens": 2}\n{"prompt_tokens": 1}\n',
         "trace:2: output_tokens is missing"),
        ('{"prompt_tokens": 1, "output_tokens": 2}\n\n{"prompt_tokens": "1", "output_tokens": 2}\n',
         "trace:3: prompt_tokens: '1' is not a whole number"),
        ('\n{"prompt_tokens": true, "output_tokens": 2}\n', "trace:2: prompt_tokens: True is no"),
        ('{"prompt_tokens": null, "output_tokens": 2}\n', "trace:1: prompt_tokens: None is no"),
        ('{"prompt_tokens": 1, "output_tokens": 2}\n[1]\n', "trace:2: must be a JSON object"),
        ('{"prompt_tokens": 1, "output_tokens": 2}\n{"prompt', "trace:2: is not valid JSON"),
        (b'{"prompt_tokens": 1, "output_tokens": 2}\n{"a": "\xff"}\n', "trace:2: "),
        ('{"prompt_tokens": 1, "output_tokens": 2, "model": 7}\n',
         "trace:1: model: 7 is not a str"),
        ('{"prompt_tokens": 1, "output_tokens": 2, "x": ' + "[" * 10**5, "trace:1: "),
        ('{"prompt_tokens": 1, "output_tokens": 2}\n{"x": ' + "[" * 10**5, "trace:2: "),
        ('[{"conversations": ' + "[" * 10**5, "trace: "),
        ('{"timestamp": "0", "input_length": 1, "output_length": 2}\n',
         "trace:1: timestamp: '0' is not a number"),
        ('{"timestamp": 0, "input_length": -1, "output_length": 2}\n',
         "trace:1: input_length: -1 is negative"),
        ('{"timestamp": 0, "input_length": 1' + "0" * 30 + ', "output_length": 2}\n',
         "trace:1: input_length: 1"),
        ("[1, 2", "is not a JSON list of conversations"),
        ("[]", "no conversation has a question and an answer"),
        ('[{"conversations": []}, {"turns": []}]', "trace: item 1 of the list"),
        ('[{"conversations": [{"value": 1}]}]', "item 0 of the list: Expected `str`"),
    ],
)  # fmt: skip
def test_nonsense_names_file_line_and_field(
    text: str | bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_trace(_file(tmp_path, text))
    assert message in str(caught.value)
    assert str(tmp_path / "trace") in str(caught.value)
    assert len(str(caught.value)) < 600


def test_files_that_are_none_and_formats_that_are_none(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_trace(path)
    file = _file(tmp_path, PLAIN + "1,2\n")
    with pytest.raises(ConfigError, match="must be one of " + ", ".join(FORMATS)):
        read_trace(file, "parquet")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="TIMESTAMP is missing"):
        read_trace(file, "azure")


def test_requests_all_at_once_have_no_rate(tmp_path: Path) -> None:
    trace = read_trace(_file(tmp_path, "arrival," + PLAIN + "3,1,2\n3,1,2\n"))
    with pytest.raises(ConfigError, match="covers no time"):
        _ = trace.rate


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_lines_are_counted_across_blocks(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_columns, "BLOCK_BYTES", 64)
    rows = [f"{number},{number + 1}" for number in range(1, 200)]
    good = read_trace(_file(tmp_path, PLAIN + ending.join(rows)))
    assert good.prompt.tolist() == list(range(1, 200))
    objects = [{"prompt_tokens": n, "output_tokens": n} for n in range(1, 200)]
    lines = [json.dumps(item) for item in objects]
    assert read_trace(_file(tmp_path, ending.join(lines))).output.tolist() == list(range(1, 200))
    rows[150] = "1,x"
    with pytest.raises(ConfigError, match="trace:152: output_tokens"):
        read_trace(_file(tmp_path, PLAIN + ending.join(rows)))
    lines[150] = "{}"
    with pytest.raises(ConfigError, match="trace:151: prompt_tokens is missing"):
        read_trace(_file(tmp_path, ending.join(lines)))
    with pytest.raises(ConfigError, match="trace:2: the line is longer than 64 B"):
        read_trace(_file(tmp_path, PLAIN + "1" * 500))


_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)


@settings(max_examples=150, deadline=None)
@given(
    header=st.sampled_from([AZURE, PLAIN, "arrival,model," + PLAIN, ""]),
    body=st.lists(st.one_of(_TEXT, st.sampled_from(["1,2", "{}", "1,2,3,4", '"1', "[", "null"]))),
)
def test_any_text_is_a_trace_or_a_named_mistake(
    header: str, body: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_text(header + "\n".join(body), encoding="utf-8", newline="")
    try:
        trace = read_trace(path)
    except ConfigError as error:
        assert str(path) in str(error)
    else:
        assert (trace.prompt >= 1).all() and (trace.output >= 1).all()


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(["arrival", "model", "prompt_tokens", "output_tokens", "x"]),
            st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), _TEXT),
        ),
        min_size=1,
    )
)
def test_any_objects_are_a_trace_or_a_named_mistake(
    rows: list[dict[str, object]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    first = {"arrival": 0.5, "model": "m", "prompt_tokens": 1, "output_tokens": 2}
    path.write_text(
        "\n".join(json.dumps(row) for row in [first, *rows]).replace("Infinity", "1e999")
    )
    try:
        trace = read_trace(path)
    except ConfigError as error:
        assert f"{path}:" in str(error)
    else:
        assert len(trace) <= 1 + len(rows)


def test_a_trace_comes_back_as_it_was_written(tmp_path: Path) -> None:
    law = PUBLISHED["azure-code"]
    speed = DecodeSpeed(tbt_s=0.02, prefill_tokens_per_s=5000)
    loads = [Load(model=name, rate=1.5, lengths=law, speed=speed) for name in ("a", "b")]
    trace = generate(loads, seconds=200, seed=1)
    write_trace(trace, tmp_path / "t.jsonl")
    back = read_trace(tmp_path / "t.jsonl")
    assert trace.arrival is not None
    np.testing.assert_array_equal(back.arrival, trace.arrival - trace.arrival[0])
    np.testing.assert_array_equal(back.service, trace.service)
    np.testing.assert_array_equal(back.prompt, trace.prompt)
    np.testing.assert_array_equal(back.output, trace.output)
    assert back.model == trace.model


def test_two_hundred_thousand_lines_take_a_moment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loads = [Load(model="m", rate=200_000, lengths=PUBLISHED["azure-code"])]
    write_trace(generate(loads, seconds=1, seed=0), tmp_path / "t.jsonl")
    begin = time.process_time()
    trace = read_trace(tmp_path / "t.jsonl", progress=True)
    assert len(trace) > 190_000
    assert time.process_time() - begin < 5  # a loop over the lines in Python takes longer
    assert "t.jsonl: 100%" in capsys.readouterr().err
