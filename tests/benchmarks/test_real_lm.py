"""The benchmark of a real language model, on a random Llama of two blocks: its GGUF file, every method, answers, tables."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from helpers import END, PAD, build_llama, build_tokenizer, write_texts
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]

import baselines  # noqa: E402
import real_lm  # noqa: E402
import runner  # noqa: E402
from runner import Job, do_job  # noqa: E402

CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<end>' }}{% endfor %}assistant: "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with its tokenizer, and texts of random words beside it."""
    path = tmp_path_factory.mktemp("real_lm")
    model = build_llama(tie_word_embeddings=True, intermediate_size=24, hidden_size=16)
    model.generation_config.eos_token_id = END
    model.save_pretrained(path)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path)
    write_texts(path, 700)
    return path


@pytest.fixture(scope="module")
def settings(folder):
    more = {"text": str(folder), "length": 64, "window": 64, "windows": 3}
    return real_lm.TextSettings(
        str(folder), "cpu", questions=2, samples=4, batch_size=2, eval_batch=2, threads=1, **more
    )


@pytest.fixture(scope="module")
def rows(settings):
    tiny = {"refine_steps": 0, "distil_steps": 0, "alternations": 1, "budget": "uniform", "significance": "none"}
    jobs = [Job("full precision", "full precision"), Job("sab_hf 4", "sab_hf", bits=4.0, options=tiny)]
    jobs += [Job(real_lm.LABELS[method], method) for method in real_lm.BASELINES]
    with pytest.MonkeyPatch.context() as patch:  # fewer candidates in the searches
        patch.setattr(baselines, "SPLIT_PERCENTILES", (30, 70))
        patch.setattr(baselines, "MAX_SALIENT_COLUMNS", 2)
        patch.setattr(real_lm, "ANSWER_TOKENS", 8)
        return [do_job(job, settings, real_lm.do) for job in jobs]


def test_every_method_runs_on_processed_text_and_counts_its_bits(rows):
    by_label = {row["label"]: row for row in rows}
    for row in rows:
        assert row["status"] == "done", row
        assert math.isfinite(row["perplexity"])
        assert len(row["answers"]) == 2
    full = by_label["full precision"]
    assert (full["same_next_token"], full["same_tokens"], full["same_first"]) == (1, 1, 1)
    assert full["bits"] == 32
    assert by_label["sab_hf 4"]["bits"] <= 4
    assert by_label["GPTQ 4-bit"]["bits"] > 4
    errors = {label: abs(row["perplexity"] / full["perplexity"] - 1) for label, row in by_label.items()}
    assert errors["GPTQ 4-bit"] < errors["sign × scale"]
    assert by_label["GPTQ 4-bit"]["same_next_token"] > by_label["sign × scale"]["same_next_token"]


def test_perplexity_is_that_of_each_window_alone(folder, settings):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(0, 256, (150,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = [model(input_ids=ids[None, i : i + 64], labels=ids[None, i : i + 64]).loss for i in (0, 64)]
    assert real_lm.perplexity(model, ids, settings) == pytest.approx(math.exp(sum(losses) / 2), rel=1e-5)


def test_calibration_is_the_whole_text_and_a_seed_cuts_it_elsewhere(folder, settings):
    tokenizer = build_tokenizer()
    ids = real_lm.tokens_of(tokenizer, str(folder), "valid")
    first, same, other = (real_lm.calibration_batches(tokenizer, settings, 0, seed) for seed in (0, 0, 1))
    rows = torch.cat([batch["input_ids"] for batch in first])
    in_order = ids[: len(ids) // 64 * 64].view(-1, 64)
    assert sorted(rows.tolist()) == sorted(in_order.tolist())
    assert not torch.equal(rows, in_order)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0]["input_ids"], other[0]["input_ids"])
    assert sum(len(batch["input_ids"]) for batch in real_lm.calibration_batches(tokenizer, settings, 5, 0)) == 5
    with pytest.raises(ValueError, match="wikitext2_valid"):
        real_lm.tokens_of(tokenizer, str(folder / "nothing"), "valid")


def test_answers_are_compared_place_by_place():
    reference = [list(range(40)), [1, 2, 3]]
    assert real_lm.compare_answers(reference, reference) == {"same_tokens": 1, "same_first": 1}
    late = [[*range(35), 0, 0, 0, 0, 0], [1, 2]]
    assert real_lm.compare_answers(late, reference) == {"same_tokens": 37 / 43, "same_first": 0.5}


def test_prompts_stand_on_the_right_and_answers_end_at_the_end_token():
    tokenizer, model = build_tokenizer(), build_llama()
    tokenizer.chat_template = CHAT
    inputs = real_lm.prompts_of(tokenizer, 3)
    assert inputs["attention_mask"][:, -1].all()
    assert tokenizer.decode(inputs["input_ids"][0]).endswith("assistant: ")
    model.lm_head = torch.nn.Linear(40, len(model.lm_head.weight))
    torch.nn.init.zeros_(model.lm_head.weight)
    with torch.no_grad():
        model.lm_head.bias[END] = 50.0
    model.generation_config.eos_token_id = [END]
    assert real_lm.greedy_answers(model, inputs, PAD) == [[END]] * 3


def test_rows_lead_with_the_first_seed_and_small_budgets_merge():
    jobs = real_lm.list_jobs(1.06, (0, 1), {"refine_steps": 3}, ", short")
    assert jobs[0].method == "full precision"
    own = [job for job in jobs if job.method == "sab_hf"]
    assert [job.bits for job in own if job.seed == 0] == [1.1, 1.06, 1.25, 1.35, 1.6, 2.1, 3.1]
    assert [job.bits for job in own if job.seed == 1] == [1.1, 1.35, 2.1]
    assert own[0].label == "sab_hf 1.1, short"
    assert own[0].options == {"refine_steps": 3}
    assert len({(job.label, job.seed) for job in jobs}) == len(jobs)
    assert {job.method for job in jobs} >= {*real_lm.BASELINES, *real_lm.PACKAGES}


def test_variants_differ_from_the_given_options():
    jobs = real_lm.list_jobs(1.2, (0,), {"distil_steps": 5, "budget": "uniform"}, ", short", variants=True)
    assert len({job.label for job in jobs}) == len(jobs) == 2 * len(real_lm.VARIANTS)
    assert {job.bits for job in jobs} == {1.2, 2.1}
    chosen = next(job for job in jobs if job.label == "2.1 bits, budget by sensitivity, short")
    assert chosen.options == {"distil_steps": 5, "budget": "sensitivity"}


def test_run_writes_json_and_table_and_resumes(folder, tmp_path, monkeypatch, capsys, rows):
    ran = []

    def run_jobs(jobs, settings, work, *, report, budget, **_):
        ran.append(([job.label for job in jobs], budget))
        known = {row["label"]: row for row in rows}
        done = [known.get(job.label) or runner._row(job, runner.NOT_RUN, reason="planted") for job in jobs]
        report(done)
        return done

    monkeypatch.setattr(runner, "run_jobs", run_jobs)
    path = tmp_path / "real.json"
    arguments = ["run", str(folder), "--text", str(folder), "--device", "cpu", "--output", str(path), "--resume"]
    real_lm.main([*arguments, "--rows", "full", "sign", "HQQ", "--deadline", "60"])
    real_lm.main([*arguments, "--rows", "full", "sign", "HQQ", "BiLLM"])
    assert ran == [(["full precision", "sign × scale", "HQQ 2-bit"], 60), (["BiLLM", "HQQ 2-bit"], math.inf)]
    written = json.loads(path.read_text())
    assert [row["label"] for row in written["rows"]] == ["full precision", "sign × scale", "BiLLM", "HQQ 2-bit"]
    assert str(folder) not in json.dumps(written["settings"])
    assert "| full precision | 32.000 |" in path.with_suffix(".md").read_text()
    capsys.readouterr()
    real_lm.main(["table", str(path), "--answers"])
    shown = capsys.readouterr().out
    assert "HQQ 2-bit (seed 0): not run: planted" in shown
    assert f"**{real_lm.PROMPTS[1]}**" in shown
    assert f"**{real_lm.PROMPTS[2]}**" not in shown
    with pytest.raises(SystemExit, match="no row"):
        real_lm.main([*arguments, "--rows", "nothing"])


def test_weights_come_out_of_a_gguf_file_as_they_were(folder, tmp_path):
    gguf = pytest.importorskip("gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    config = model.config
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_eos_token_id(END)
    writer.add_pad_token_id(PAD)
    names = {real_lm._name_of(f"blk.{block}.{part}.weight"): f"blk.{block}.{part}.weight" for block in range(2) for part in (
        "attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}  # fmt: skip
    names |= {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for name, weight in model.state_dict().items():
        if name not in names:
            assert name == "lm_head.weight"
            continue
        heads = {"attn_q": 2, "attn_k": 1}.get(names[name].split(".")[-2])
        if heads:  # as llama.cpp converts: the halves of a rotary pair beside each other
            weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names[name], weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    again = real_lm.read_model(tmp_path / "model.gguf")
    assert again.dtype == torch.bfloat16
    assert (again.config.eos_token_id, again.config.pad_token_id) == (END, PAD)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
