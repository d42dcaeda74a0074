"""Long documents: where they come from, what a model is shown of them, and that one reading serves all questions."""

import json
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_lm import ByteTokenizer
from megalodon_lm.architectures import build, config_of
from megalodon_lm.cli.main import main
from megalodon_lm.data.subword import SubwordTokenizer
from megalodon_lm.errors import InputError
from megalodon_lm.evaluation.documents import TASKS, Document, DocumentRun, Question, find_task
from megalodon_lm.evaluation.documents_data import load, solved_examples
from megalodon_lm.evaluation.long_prompts_run import LongRun
from megalodon_lm.evaluation.read_once import Reader
from megalodon_lm.evaluation.recall_prose import Prose, ProseTask
from megalodon_lm.evaluation.results import Results

from .reading import TEXT
from .test_architectures import made, values
from .test_tokenizers import byte_level

BYTES = ByteTokenizer()
STORY = TEXT[:1300].decode()
OPTIONS = "(A) one\n (B)  two words\n (C) three\n (D) four"


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def scrolls(folder, task, inputs, split="validation"):
    """Rows as tau/scrolls has them: (id, input, output)."""
    rows = [{"id": i, "pid": f"{i}_{n}", "input": text, "output": out} for n, (i, text, out) in enumerate(inputs)]
    jsonl(folder / TASKS[task].hub_name / f"{split}.jsonl", rows)


def test_rows_of_scrolls_become_documents(tmp_path):
    """Whatever lies between the questions of a document, and with all references of a question."""
    rows = [
        ("q1", "Who?\n\nFirst paper.\n\nIts end.", "He"),
        ("q3", "Why?\n\nSecond paper.", "Unanswerable"),
        ("q1", "Who?\n\nFirst paper.\n\nIts end.", "That man"),
        ("q2", "When?\n\nFirst paper.\n\nIts end.", "Yes"),
    ]
    scrolls(tmp_path, "qasper", rows)
    first, second = load(find_task("qasper"), tmp_path)
    assert first.text == "First paper.\n\nIts end."
    assert first.questions == [Question("q1", "Who?", ("He", "That man")), Question("q2", "When?", ("Yes",))]
    assert second == Document("Second paper.", [Question("q3", "Why?", ("Unanswerable",))])
    assert load(find_task("qasper"), tmp_path, limit=1) == [first]
    scrolls(tmp_path, "govreport", [("g", "A report.\n\nOn.", "Sum.")])
    assert load(find_task("govreport"), tmp_path) == [Document("A report.\n\nOn.", [Question("g", "", ("Sum.",))])]
    scrolls(tmp_path, "contractnli", [("c", "We may.\n\nContract.", "Entailment")])
    [contract] = load(find_task("contractnli"), tmp_path)
    assert contract.questions[0].choices == ("Not mentioned", "Entailment", "Contradiction")
    scrolls(tmp_path, "quality", [("m", f"What?\n\n{OPTIONS}\n\nA story.\n\nIts end.", "two words")])
    [story] = load(find_task("quality"), tmp_path)
    assert story.text == "A story.\n\nIts end."
    assert story.questions == [Question("m", "What?", ("two words",), ("one", "two words", "three", "four"))]


def test_ids_and_outputs_that_are_unlike_others(tmp_path):
    """One id under two questions stays two questions; an output that is no text, or no choice, is refused."""
    scrolls(
        tmp_path, "narrativeqa", [("n", "Who?\n\nTale.", "He"), ("n", "When?\n\nTale.", "Then"), ("e", "What?\n\n", "")]
    )
    tale, nothing = load(find_task("narrativeqa"), tmp_path)
    assert tale.questions == [Question("n", "Who?", ("He",)), Question("n", "When?", ("Then",))]
    assert nothing == Document("", [Question("e", "What?", ("",))])
    for task, output, said in (
        ("qasper", None, "the test split has no outputs"),
        ("contractnli", "Maybe", "is none of its choices"),
        ("quality", "five", "is none of its choices"),
    ):
        scrolls(tmp_path, task, [("i", f"What?\n\n{OPTIONS}\n\nA story.", output)])
        with pytest.raises(InputError, match=said):
            load(find_task(task), tmp_path)


def test_what_nobody_asks_or_answers_is_left_out(tmp_path):
    jsonl(tmp_path / "qmsum" / "val.jsonl", [meeting(["Hello ."], []), meeting(["Bye ."], [("What?", "Much.")])])
    assert [document.text for document in load(find_task("qmsum"), tmp_path)] == ["Grad A: Bye ."]
    tales = tmp_path / "fairytaleqa" / "data-by-train-split"
    for kind in ("section-stories", "questions"):
        (tales / kind / "val").mkdir(parents=True)
    (tales / "section-stories/val/x-story.csv").write_text("section,text\n1,Once.\n")
    (tales / "questions/val/x-questions.csv").write_text("question_id,question,answer1\n1,When?,\n2,Who?,he\n")
    [tale] = load(find_task("fairytaleqa"), tmp_path)
    assert [question.text for question in tale.questions] == ["Who?"]


def test_tales_in_fields_of_any_length_and_of_no_text(tmp_path):
    """Python's reader of CSV stops at 131,072 characters by itself."""
    tales, long = tmp_path / "fairytaleqa" / "data-by-train-split", "Once. " * 30_000
    for kind in ("section-stories", "questions"):
        (tales / kind / "val").mkdir(parents=True)
    (tales / "section-stories/val/x-story.csv").write_text(f"section,text\n1,{long}\n2,The end.\n")
    (tales / "questions/val/x-questions.csv").write_text("question_id,question,answer1,answer2\n1,Who?,he\n")
    [tale] = load(find_task("fairytaleqa"), tmp_path)
    assert tale == Document(f"{long}\nThe end.", [Question("x-1", "Who?", ("he",))])
    (tales / "questions/val/x-questions.csv").write_bytes(b"question_id,question\n1,\xff\n")
    with pytest.raises(InputError, match=r"x-questions\.csv is no CSV in UTF-8"):
        load(find_task("fairytaleqa"), tmp_path)


def test_archives_and_the_hub(tmp_path, monkeypatch):
    scrolls(tmp_path, "narrativeqa", [("n", "Who?\n\nTale.", "He")])
    folder = tmp_path / "narrative_qa"
    with zipfile.ZipFile(tmp_path / "narrative_qa.zip", "w") as archive:
        archive.write(folder / "validation.jsonl", "narrative_qa/validation.jsonl")
    (folder / "validation.jsonl").unlink()
    expected = [Document("Tale.", [Question("n", "Who?", ("He",))])]
    assert load(find_task("narrativeqa"), tmp_path) == expected

    import huggingface_hub

    def download(repository, name, repo_type):
        assert (repository, name, repo_type) == ("tau/scrolls", "narrative_qa.zip", "dataset")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load(find_task("narrativeqa"), None) == expected

    def offline(*_, **__):
        raise OSError("no such network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(InputError, match=r"could not be had from the hub \(no such network\); give --data"):
        load(find_task("narrativeqa"), None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"pip install 'megalodon-lm\[eval\]'"):
        load(find_task("narrativeqa"), None)
    with pytest.raises(InputError, match="is not on the hub"):
        load(find_task("fairytaleqa"), None)


def test_a_damaged_archive_is_refused_wherever_the_damage_is(tmp_path):
    scrolls(tmp_path, "narrativeqa", [("n", "Who?\n\nTale.", "He"), ("m", "Where?\n\nOther tale.", "There")])
    expected = load(find_task("narrativeqa"), tmp_path)
    folder, path = tmp_path / "narrative_qa", tmp_path / "narrative_qa.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "validation.jsonl", "narrative_qa/validation.jsonl")
    (folder / "validation.jsonl").unlink()
    whole, said = path.read_bytes(), []
    for at in range(len(whole)):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :]):
            path.write_bytes(damaged)
            try:
                assert load(find_task("narrativeqa"), tmp_path) == expected
            except InputError as error:
                said.append(str(error))
    assert len(said) > len(whole)
    assert all("narrative_qa" in line for line in said)


def meeting(words, queries):
    return {
        "topic_list": [],
        "general_query_list": [{"query": q, "answer": a} for q, a in queries[:1]],
        "specific_query_list": [{"query": q, "answer": a, "relevant_text_span": []} for q, a in queries[1:]],
        "meeting_transcripts": [{"speaker": "Grad A", "content": w} for w in words],
    }


def test_layouts_of_the_authors(tmp_path):
    queries = [("What was said?", "Much."), ("Who agreed?", "Nobody did.")]
    jsonl(tmp_path / "qmsum" / "val.jsonl", [meeting(["Hello .", "Mm-hmm ."], queries)])
    (tmp_path / "qmsum" / "train").mkdir()
    (tmp_path / "qmsum" / "train" / "a.json").write_text(json.dumps(meeting(["Begin ."], queries), indent=1))
    [found] = load(find_task("qmsum"), tmp_path)
    assert found.text == "Grad A: Hello .\nGrad A: Mm-hmm ."
    assert [(q.text, q.references) for q in found.questions] == [(q, (a,)) for q, a in queries]
    [example] = solved_examples(find_task("qmsum"), tmp_path, 1)
    assert (example.text, len(example.questions)) == ("Grad A: Begin .", 1)
    with pytest.raises(InputError, match="2 solved examples are more than the 1 training documents"):
        solved_examples(find_task("qmsum"), tmp_path, 2)

    row = {"instructions": [f"Where?\n\n {OPTIONS}"], "outputs": ["(C) three"], "input": "Story."}
    jsonl(tmp_path / "leval" / "quality.jsonl", [row])
    [question] = load(find_task("quality"), tmp_path)[0].questions
    assert (question.text, question.references) == ("Where?", ("three",))
    assert question.choices == ("one", "two words", "three", "four")
    jsonl(
        tmp_path / "leval" / "tv_show_summ.jsonl", [{"instructions": ["Sum up."], "outputs": ["Ok."], "input": "Act."}]
    )
    assert load(find_task("summscreen"), tmp_path)[0].questions[0].references == ("Ok.",)

    tales = tmp_path / "fairytaleqa" / "data-by-train-split"
    for kind in ("section-stories", "questions"):
        (tales / kind / "val").mkdir(parents=True)
    (tales / "section-stories/val/x-story.csv").write_text('section,text\n1,"Once, long ago."\n2,The end.\n')
    (tales / "questions/val/x-questions.csv").write_text(
        "question_id,question,answer1,answer2\n1,When?,once,long ago\n"
    )
    [tale] = load(find_task("fairytaleqa"), tmp_path)
    assert tale == Document("Once, long ago.\nThe end.", [Question("x-1", "When?", ("once", "long ago"))])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "a row has no 'id'"),
        ("[]", "line 1, holds no JSON object"),
        ("{", "line 1, holds no JSON object"),
        ("\n\n", "more than the 0 training documents"),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, said):
    (tmp_path / "qasper").mkdir()
    (tmp_path / "qasper" / "train.jsonl").write_text(content)
    with pytest.raises(InputError, match=said):
        solved_examples(find_task("qasper"), tmp_path, 2)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no validation documents in .*qmsum/val.jsonl"):
        load(find_task("qmsum"), tmp_path)
    with pytest.raises(InputError, match="or take --shots 0"):
        solved_examples(find_task("qmsum"), tmp_path, 1)
    with pytest.raises(InputError, match="is no folder"):
        load(find_task("qmsum"), tmp_path / "no")
    with pytest.raises(InputError, match="no task 'qmsam'; did you mean 'qmsum'"):
        find_task("qmsam")
    jsonl(tmp_path / "leval" / "quality.jsonl", [{"instructions": ["none"], "outputs": ["(A)"], "input": "s"}])
    with pytest.raises(InputError, match="is not laid out as its authors do"):
        load(find_task("quality"), tmp_path)


def model(name, **changes):
    torch.manual_seed(0)
    return build(config_of(values(name, **changes))).eval()


DOCUMENTS = [
    Document(STORY, [Question(f"a{n}", f"Who is number {n}?", ("the count", "no one")) for n in range(3)]),
    Document(STORY[100:900], [Question("b0", "Where?", ("castle",))]),
]
EXAMPLE = [Document(STORY[500:1200], [Question("e", "Why?", ("who knows",))])]


@pytest.mark.parametrize("metric", ["f1", "rouge"])
def test_one_reading_is_as_good_as_many(metric, tiny):
    task = short(metric)
    results = []
    for anew in (False, True):
        run = DocumentRun(task, Reader(tiny, BYTES), EXAMPLE, anew)
        results.append(run.result(DOCUMENTS))
    (once, answers), (many, others) = results
    assert answers == others
    assert [answer.id for answer in answers] == ["a0", "a1", "a2", "b0"]
    assert once.scores == many.scores
    assert once.headline == metric
    assert (once.shots, once.samples, once.notes) == (1, 4, {"documents": 2})
    assert once.tokens_reread == many.tokens_reread
    assert 2 * once.tokens_computed < many.tokens_computed


@pytest.mark.parametrize("name", ["megalodon", "mamba"])
@given(
    st.integers(0, 700),
    st.lists(
        st.one_of(st.text("why?", max_size=40), st.integers(500, 700).map(lambda n: STORY[-n:])),
        min_size=9,
        max_size=10,
    ),
    st.booleans(),
)
@settings(max_examples=2, deadline=None)
def test_any_questions_about_any_document(name, length, questions, shown):
    """More than are written side by side, some of them the same, longer than the document, or nothing at all."""
    asked = [Question(str(n), text, ("the count",)) for n, text in enumerate(questions)]
    once, anew = (
        DocumentRun(short("f1"), Reader(made(name, torch.float32), BYTES), EXAMPLE if shown else (), anew).result(
            [Document(STORY[:length], asked), Document("", asked[:1])]
        )
        for anew in (False, True)
    )
    assert once[1] == anew[1]
    assert [answer.id for answer in once[1]] == [*(question.id for question in asked), "0"]


def test_answers_are_written_beside_the_same_others(tiny):
    """Read once or anew: models without compiled steps round by the company that a row has."""
    together = []

    class Watching(Reader):
        def write(self, contexts, max_tokens, stop=()):
            together.append([context.position for context in contexts])
            return super().write(contexts, max_tokens, stop)

    asked = [Question(str(n), "why" * (7 * n % 10), ("the count",)) for n in range(10)]
    for anew in (False, True):
        DocumentRun(short("f1"), Watching(tiny, BYTES), (), anew).result([Document("", asked)])
    assert [len(positions) for positions in together] == [8, 2, 8, 2]
    assert together[:2] == together[2:]


def test_tokens_never_reach_from_the_document_into_the_question():
    """Though letters on either side of the border would make one token: the document is read before it is asked."""
    tokenizer = SubwordTokenizer(byte_level())
    at = next(at for at in range(1, len(STORY)) if len(tokenizer.encode(STORY[at - 1 : at + 1])) == 1)
    model = made("megalodon", torch.float32, vocab_size=tokenizer.vocab_size)
    task = replace(short("f1"), ask="{}")
    asked = [
        Question(str(n), text, ("the count",)) for n, text in enumerate((STORY[at : at + 40], STORY[at : at + 90]))
    ]
    once, anew = (
        DocumentRun(task, Reader(model, tokenizer), (), anew).result([Document(STORY[:at], asked)])
        for anew in (False, True)
    )
    assert once[1] == anew[1]
    for question, answer in zip(asked, once[1], strict=True):
        parts = [tokenizer.encode(STORY[:at], begin=True), tokenizer.encode(question.text)]
        alone = Reader(model, tokenizer)
        most = round(12 * len(parts[0][1:]) / at)
        [said] = alone.write([alone.read(np.concatenate(parts))], most, ["\n"])
        assert said.strip() == answer.said


@pytest.mark.parametrize("begins", [True, False])
def test_texts_begin_as_those_the_model_learnt_from(tiny, begins):
    """With the begin token, or without: documents, long prompts of either kind, needles in prose."""
    read = []

    class Told(ByteTokenizer):
        pass

    class Watching(Reader):
        def read(self, tokens, after=None):
            context = super().read(tokens, after)
            read.extend([token] for token in tokens[:1] if after is None or not after.position)
            return context

    Told.begins = begins
    reader = Watching(tiny, Told())
    DocumentRun(short("f1"), reader).result([Document(STORY, [Question("0", "why", ("the count",))])])
    prose = Prose([TEXT], Told())
    for question in ("after", "before"):
        LongRun("needle", prose, 600, (0.5,), 1, question=question).result(reader)
    assert len(read) >= 3
    assert all((first == [BYTES.begin]) == begins for first in read)
    sequences = ProseTask("passkey", prose, 256, 1, "after").sequences(8, 1, [0])
    assert (sequences.tokens[0, 0] == BYTES.begin) == begins


def short(metric):
    """A task with short answers."""
    return replace(TASKS["narrativeqa"], metric=metric, answer_bytes=12)


def test_choices_are_compared(tiny):
    choices = ("Not mentioned", "Entailment", "Contradiction")
    document = Document(STORY, [Question(str(n), "We may.", (choice,), choices) for n, choice in enumerate(choices)])
    run = DocumentRun(find_task("contractnli"), Reader(tiny, BYTES))
    result, answers = run.result([document])
    assert len({answer.log_likelihoods for answer in answers}) == 1  # the same question three times
    likelihoods = answers[0].log_likelihoods
    assert [a.scores["acc"] for a in answers] == [float(v == max(likelihoods)) for v in likelihoods]
    by_length = [v / len(c) for v, c in zip(likelihoods, choices, strict=True)]
    assert [a.scores["acc_norm"] for a in answers] == [float(v == max(by_length)) for v in by_length]
    assert result.scores["acc"].value == pytest.approx(1 / 3)
    assert result.headline == "acc_norm"
    text = STORY + "\n\nHypothesis: We may.\nConclusion:"
    alone = Reader(tiny, BYTES)
    expected = alone.score(alone.read(BYTES.encode(text, begin=True)), [BYTES.encode(f" {c}") for c in choices])
    assert likelihoods == tuple(score.log_likelihood for score in expected)


def test_a_window_cuts_and_says_so():
    """So that the longest question and its answer fit; what stands last stays."""
    documents, seen = [], []

    class Watching(Reader):
        def read(self, tokens, after=None):
            if after is None:
                documents.append(tokens)
            return super().read(tokens, after)

        def each(self, texts, after=None):
            seen.extend(np.concatenate([documents[-1], text]) for text in texts)
            return super().each(texts, after)

    llama = model("llama", window=600)
    result, answers = DocumentRun(short("f1"), Watching(llama, BYTES), EXAMPLE).result(DOCUMENTS)
    assert result.notes["window"] == 600
    assert result.notes["documents_cut"] == 2
    whole = len(BYTES.encode(EXAMPLE[0].text + "\n\nQuestion: Why?\nAnswer: who knows\n\n\n", begin=True))
    asked = [len("\n\nQuestion: Who is number 0?\nAnswer:"), len("\n\nQuestion: Where?\nAnswer:")]
    lengths = [len(document.text.encode()) for document in DOCUMENTS]
    assert result.notes["tokens_cut"] == sum(whole + n + q + 12 - 600 for n, q in zip(lengths, asked, strict=True))
    assert [len(text) + 12 for text in seen] == [600] * 4
    assert all(text[0] == BYTES.begin for text in seen)
    _, anew = DocumentRun(short("f1"), Reader(llama, BYTES), EXAMPLE, anew=True).result(DOCUMENTS)
    assert anew == answers
    assert BYTES.decode(seen[-1]).endswith(STORY[800:900] + "\n\nQuestion: Where?\nAnswer:")
    with pytest.raises(InputError, match="a window of 40 tokens has no room"):
        DocumentRun(short("f1"), Reader(model("llama", window=40), BYTES)).result(DOCUMENTS)


def test_right_answers_score_and_silence_is_unanswerable(tiny, monkeypatch):
    right = iter([" The Count.\n", "no one", "a horse of the count", "  "])
    monkeypatch.setattr(Reader, "write", lambda self, contexts, *_: [next(right) for _ in contexts])
    _, answers = DocumentRun(find_task("qasper"), Reader(tiny, BYTES)).result(DOCUMENTS)
    assert [answer.scores["f1"] for answer in answers] == pytest.approx([1, 1, 2 / 4, 0])
    assert answers[-1].said == "Unanswerable"
    with pytest.raises(InputError, match="no document with a question"):
        DocumentRun(find_task("qasper"), Reader(tiny, BYTES)).result([])


def test_the_command(tmp_path, saved, capsys, monkeypatch):
    """As docs/evaluation.md shows it, and without a look at the network."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    cut = "Hello \ud83d ."  # within a character
    jsonl(tmp_path / "data" / "qmsum" / "val.jsonl", [meeting([cut] * 30, [("What?", "Much."), ("Who?", "He.")])])
    jsonl(tmp_path / "data" / "qmsum" / "train" / "a.json", [meeting(["Begin ."], [("What?", "Little.")])])
    scrolls(tmp_path / "data", "quality", [("m", f"What?\n\n{OPTIONS}\n\nA story.", "two words")])
    out, said = tmp_path / "results.json", tmp_path / "answers.jsonl"
    arguments = ["evaluate", "documents", "qmsum,quality", str(saved), "--data", str(tmp_path / "data")]
    main([*arguments, "--out", str(out), "--answers", str(said), "--quiet"])
    shown = capsys.readouterr().out
    assert "qmsum" in shown
    found = Results.load(out)
    assert [(task.task, task.shots, task.samples) for task in found.tasks] == [("qmsum", 1, 2), ("quality", 0, 1)]
    assert set(found.tasks[0].scores) == {"rouge1", "rouge2", "rougeL", "rouge"}
    assert all(task.peak_memory is None or task.peak_memory > 1 << 24 for task in found.tasks)
    lines = [json.loads(line) for line in said.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["val-0-0", "val-0-1", "m"]
    main([*arguments, "--out", str(out), "--answers", str(said), "--limit", "1", "--quiet"])  # replaces its own kind
    for wrong in (["--shots", "-1"], ["--limit", "0"], ["--shots", "3"]):
        with pytest.raises(SystemExit):
            main([*arguments, *wrong])
        assert capsys.readouterr().err.startswith("megalodon: error: ")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_document(saved, tmp_path):
    """In processes of their own: five questions about a thousand bytes, and about a million."""
    peaks = []
    for times in (1, 1000):
        text = (STORY[:1000] * times).replace("\n\n", "\n")
        rows = [(str(n), f"What {n}?\n\n{OPTIONS}\n\n{text}", "three") for n in range(5)]
        scrolls(tmp_path / str(times), "quality", rows)
        out = tmp_path / f"{times}.json"
        command = [
            "evaluate",
            "documents",
            "quality",
            str(saved),
            "--data",
            str(tmp_path / str(times)),
            "--out",
            str(out),
        ]
        subprocess.run([sys.executable, "-m", "megalodon_lm", *command, "--quiet"], check=True)
        peaks.append(Results.load(out).tasks[0].peak_memory)
    if None in peaks:
        pytest.skip("the system does not tell")
    assert peaks[1] < 1.08 * peaks[0]
