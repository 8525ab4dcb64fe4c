"""Inference: sharing changes no number, engines are asked the same, answers survive kills, credentialed text stays."""
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from zlib import crc32

import pytest
import torch
from faulty_proxy import FAULTS, JSON, Proxy
from hypothesis import given, settings
from hypothesis import strategies as st
from teacher_runs import assert_each_once, lines

from ehr_r1.data.tasks import TASKS
from ehr_r1.evaluation.answers import asks_of, predictions_of
from ehr_r1.inference.asking import Ask, answer
from ehr_r1.inference.checkpoints import chat_text
from ehr_r1.inference.endpoints import InferenceError, Refused
from ehr_r1.inference.engines import Engine, Text, Yes, yes_no_tokens
from ehr_r1.inference.local import Transformers
from ehr_r1.inference.prefixes import shared_prefixes
from ehr_r1.inference.servers import ServerEngine
from ehr_r1.inference.vllm import VllmEngine
from ehr_r1.intervals import score_all
from ehr_r1.training.examples import Writer
from ehr_r1.training.models import new_model

pytest_plugins = ['tiny_model']  # samples, model, tokenizer, folder, writer, asks, prompts


@pytest.fixture
def file(tmp_path):
    "Where answers shall stand."
    return tmp_path/'a.jsonl'


def answered(asks, engine, file, max_tokens=24):
    "Have open questions answered."
    return answer(asks, engine, file, max_tokens, access='open')


def decisions_among(asks):
    return [ask for ask in asks if ask.kind == 'decision']


def ids_of(tokenizer, prompt):
    "A prompt as a batch of one."
    return torch.tensor([tokenizer.encode(prompt)])


def places_in(groups):
    "Places of prompts, a list a group, as one list in order."
    return sorted(place for places in groups for place in places)


# sharing


@pytest.fixture(scope='module')
def alone(model, tokenizer):
    "Asks every prompt by itself, nothing shared."
    return Transformers(model, tokenizer, slots=1, share=False)


@pytest.fixture(scope='module')
def risks(alone, prompts):
    return alone.p_yes(prompts)


@pytest.fixture(scope='module')
def texts(alone, prompts):
    return alone.generate(prompts, 12)


def test_answers_differ_from_prompt_to_prompt(alone, prompts, risks, texts):
    assert all(len(batch) == 1 for batch in alone.plan(prompts))
    different_risks = {round(risk.p, 4) for risk in risks}
    different_texts = {text.text for text in texts}
    assert len(different_risks) > 20
    assert len(different_texts) > 10
    assert {text.finish for text in texts} == {'stop', 'length'}


@pytest.fixture(scope='module', params=[2_000, 9_000, 100_000, 'apart'])
def batched(request, model, tokenizer):
    "Asks prompts in batches of so many slots; the last one shares nothing."
    if request.param == 'apart':
        return Transformers(model, tokenizer, slots=9_000, share=False)
    return Transformers(model, tokenizer, slots=request.param)


def test_batching_changes_no_number(batched, tokenizer, prompts, risks):
    sizes = [len(batch) for batch in batched.plan(prompts)]
    assert max(sizes) > 2
    got = batched.p_yes(prompts)
    for prompt, ours, alone in zip(prompts, got, risks, strict=True):
        assert ours.tokens == len(tokenizer.encode(prompt))
        apart = abs(ours.yes - alone.yes) + abs(ours.no - alone.no)
        assert apart < 1e-5
        assert abs(ours.p - alone.p) < 1e-4


def test_batching_changes_no_word(batched, prompts, texts):
    assert batched.generate(prompts, 12) == texts


@pytest.mark.parametrize('place', range(8))
def test_words_are_those_of_transformers_own_generate(model, tokenizer, prompts, place):
    prompt = prompts[place]
    [ours] = Transformers(model, tokenizer).generate([prompt], 12)
    ids = ids_of(tokenizer, prompt)
    tokens = ids.shape[1]
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=12, do_sample=False)
    written = out[0, tokens:].tolist()
    ended = tokenizer.eos_token_id in written
    text = tokenizer.decode(written[:-1] if ended else written)
    finish = 'stop' if ended else 'length'
    assert ours == Text(text, tokens, len(written), finish)


SAYS_YES = ('yes', 'Yes', 'YES', ' yes', ' Yes', ' YES')
SAYS_NO = ('no', 'No', 'NO', ' no', ' No', ' NO')


def test_p_yes_is_the_softmax_over_the_whole_vocabulary(model, tokenizer, prompts):
    words = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    yes = [token for token, word in enumerate(words) if word in SAYS_YES]
    no = [token for token, word in enumerate(words) if word in SAYS_NO]
    assert yes_no_tokens(tokenizer) == (yes, no)
    assert len(yes) > 1
    prompt = prompts[0]
    with torch.no_grad():
        out = model(ids_of(tokenizer, prompt))
    last = out.logits[0, -1].double()
    p = last.softmax(0)
    p_yes, p_no = p[yes].sum(), p[no].sum()
    [got] = Transformers(model, tokenizer).p_yes([prompt])
    assert got.yes == pytest.approx(p_yes.item(), rel=1e-5)
    assert got.no == pytest.approx(p_no.item(), rel=1e-5)
    assert got.p == got.yes/(got.yes + got.no)
    assert got.outside == 0


def test_end_token_ends_a_row_and_not_its_neighbours(model, tokenizer, prompts):
    plain = Transformers(model, tokenizer).generate(prompts, 12)
    engine = Transformers(model, tokenizer)
    for prompt in prompts[1:6:2]:
        ids = ids_of(tokenizer, prompt)
        with torch.no_grad():
            written = model.generate(ids, max_new_tokens=4, do_sample=False)
        fourth = written[0, -1].item()  # stands somewhere else in other answers
        engine.ends = engine.ends | {fourth}
    got = engine.generate(prompts, 12)
    stopped = [text for text in got if text.finish == 'stop']
    assert len(stopped) >= 3
    assert len({text.new_tokens for text in stopped}) > 1
    assert any(text.finish == 'length' for text in got)
    for unended, text in zip(plain, got):
        half_a_character = '�' in text.text
        assert half_a_character or unended.text.startswith(text.text)


def test_one_token_is_one_token(model, tokenizer, prompts):
    engine = Transformers(model, tokenizer)
    texts = engine.generate(prompts[:5], 1)
    assert [text.new_tokens for text in texts] == [1]*5


def test_no_prompts_have_no_answers(alone):
    assert alone.generate([], 5) == []
    assert alone.p_yes([]) == []


def test_an_empty_prompt_is_an_error(alone):
    with pytest.raises(InferenceError, match='empty prompt'):
        alone.p_yes([''])


tokens_of_three = st.integers(0, 2)
tokens_of_two = st.integers(0, 1)
small_row = st.lists(tokens_of_three, min_size=1, max_size=7)
smaller_row = st.lists(tokens_of_two, min_size=1, max_size=5)
small_rows = st.lists(small_row, max_size=12)
smaller_rows = st.lists(smaller_row, min_size=1, max_size=6)


@given(small_rows, st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_groups_hold_every_prompt_once_and_what_they_say_they_share(rows, most):
    groups = shared_prefixes(rows, most, worth=1)
    places = places_in(group.places for group in groups)
    assert places == list(range(len(rows)))
    for prefix, places in groups:
        members = [rows[place] for place in places]
        lengths = [len(row) for row in members]
        begins = {tuple(row[:prefix]) for row in members}
        alone = len(members) == 1
        assert len(begins) == 1
        assert prefix < min(lengths)
        assert alone == (prefix == 0)
        assert alone or len(members)*max(lengths) <= most


@given(smaller_rows)
@settings(max_examples=60, deadline=None)
def test_no_other_cut_of_the_sorted_prompts_saves_more(rows):
    order = sorted(rows)

    def saved(prefix, members):
        return prefix*(len(members) - 1)

    def saved_by(members):
        common = os.path.commonprefix(members)
        shortest = min(len(row) for row in members)
        return saved(min(len(common), shortest - 1), members)

    def best_from(begin):
        best = 0
        for end in range(begin + 1, len(order) + 1):
            best = max(best, saved_by(order[begin:end]) + best_from(end))
        return best

    groups = shared_prefixes(rows, 10**9, worth=1)
    savings = [saved(prefix, places) for prefix, places in groups]
    assert sum(savings) == best_from(0)


@pytest.mark.parametrize('slots', [1_500, 4_000, 20_000])
def test_batches_hold_every_prompt_once_and_keep_to_the_slots(model, tokenizer, prompts, slots):
    engine = Transformers(model, tokenizer, slots=slots)
    plan = engine.plan(prompts, 10)
    assert places_in(plan) == list(range(len(prompts)))
    lengths = [len(tokenizer.encode(prompt)) for prompt in prompts]
    for batch in plan:
        longest = max(lengths[place] for place in batch)
        assert len(batch) == 1 or len(batch)*longest <= slots


def test_a_tokenizer_without_yes_is_refused():
    class Letters:
        def encode(self, text, add_special_tokens):
            return [ord(letter) for letter in text]
    with pytest.raises(InferenceError, match="no token for 'yes'"):
        yes_no_tokens(Letters())


# asks


@pytest.mark.parametrize('mode, of_risks', [
    ('plain', 'plain'),
    ('think', 'no_think'),
    ('no_think', 'no_think'),
])
def test_risk_questions_are_never_asked_with_thinking(samples, writer, mode, of_risks):
    made = asks_of(samples, writer, mode)
    modes = {(ask.kind, ask.mode) for ask in made}
    assert modes == {('decision', mode), ('risk', of_risks)}
    for ask in made:
        thinking_is_over = ask.prompt.rstrip().endswith('</think>')
        assert thinking_is_over == (ask.mode != 'think')


def test_an_ask_is_a_rendered_sample(samples, writer, tokenizer):
    sample = samples.row(0, named=True)
    [ask] = asks_of(samples.head(1), writer, 'think')
    assert ask.prompt == chat_text(tokenizer, sample['messages'], 'no_think')
    assert ask.sample_id == 's000'
    assert ask.task == sample['task']
    assert ask.dropped == 0


def test_long_records_are_cut_and_counted(samples, tokenizer):
    made = asks_of(samples, Writer(tokenizer, 100, 24), 'plain')
    cut = [ask for ask in made if ask.dropped > 0]
    assert len(cut) > 5
    for ask in made:
        assert len(tokenizer.encode(ask.prompt)) <= 100
        assert '## Patient' in ask.prompt
        assert TASKS[ask.task].instruction in ask.prompt


# answers


class Counting(Engine):
    "Answers at once, and remembers what it was asked."
    name, batch = 'counting', 8

    def __init__(self):
        self.asked = []

    def ask(self, prompts, max_tokens=0):
        for place, prompt in enumerate(prompts):
            self.asked.append(prompt)
            text = Text(f'Sodium\nline {len(prompt)}', 10, 5, 'stop')
            yield place, text if max_tokens else Yes(.3, .1, 10)


def test_answers_come_in_the_order_of_the_asks(asks, file):
    made = answered(asks, Counting(), file)
    for line, ask in zip(made, asks, strict=True):
        assert line['sample_id'] == ask.sample_id
        assert line['task'] == ask.task
        assert line['kind'] == ask.kind
        assert line['mode'] == ask.mode


def test_answers_make_predictions_that_are_scored(samples, asks, file):
    made = predictions_of(answered(asks, Counting(), file))
    of_mortality = made.filter(task='Inpatient_Mortality')
    assert set(of_mortality['risk']) == {.3/(.3 + .1)}
    assert made['fallback'].null_count() == len(made)
    scores = score_all(samples, dict(counting=made), replicates=20)
    f1 = scores.filter(metric='f1', task='overall')['value'][0]
    assert f1 == .5  # one of two lines


def test_no_asks_have_no_answers(file):
    assert answered([], Counting(), file) == []
    assert predictions_of([]).height == 0


def test_digests_are_what_earlier_runs_kept_answers_under(file):
    risk = Ask('s1', 'Inpatient_Mortality', 7, 'risk', 'Will the patient die?', 'no_think')
    decision = Ask('s2', 'labevents', 7, 'decision', 'Name the tests to come.', 'think')
    answered([risk, decision], Counting(), file, 16)
    of_risk, of_decision = [line['digest'] for line in lines(file)]
    assert of_risk == '2434d452dd7d0b452848476bac79ccc3'
    assert of_decision == '14fa8c0d537c93d1a68f50341c47f9da'


def test_nothing_is_asked_twice(asks, file):
    engine = Counting()
    first = answered(asks[:20], engine, file)
    assert answered(asks[:20], engine, file) == first
    assert len(engine.asked) == 20
    assert answered(asks, engine, file)[:20] == first
    assert len(lines(file)) == len(asks)
    assert len(engine.asked) <= len(asks) + engine.batch  # the batch of the last line


def test_another_longest_answer_is_nothing_to_risk_questions(asks, file):
    answered(asks, Counting(), file, 24)
    engine = Counting()
    answered(asks, engine, file, 25)
    assert len(engine.asked) == len(decisions_among(asks))


def test_another_prompt_is_asked(asks, file):
    engine = Counting()
    first = asks[0]
    answered([first], engine, file)
    another = replace(first, prompt='another')
    answered([another], engine, file)
    assert engine.asked[-1] == 'another'


def test_another_engine_is_asked(asks, file):
    answered(asks[:1], Counting(), file)
    engine = Counting()
    engine.name = 'another'
    answered(asks[:1], engine, file)
    assert lines(file)[-1]['name'] == 'another'


@pytest.mark.parametrize('at', [0, 1, 700, 5_000, -1])
def test_a_torn_file_is_mended_to_the_same_bytes(model, tokenizer, asks, file, at):
    engine = Transformers(model, tokenizer, slots=4_000)
    first = answered(asks[:20], engine, file, 4)
    whole = file.read_bytes()
    file.write_bytes(whole[:at])
    assert answered(asks[:20], engine, file, 4) == first
    assert file.read_bytes() == whole


KILLED = textwrap.dedent('''
    import sys
    import time
    sys.path[:0] = sys.argv[3:]
    from test_inference import Counting, answered, asks_for_a_kill

    class Slow(Counting):
        whole = sys.argv[2] == 'whole'

        def ask(self, prompts, max_tokens=0):
            for made in super().ask(prompts, max_tokens):
                time.sleep(.01)
                yield made

    answered(asks_for_a_kill(), Slow(), sys.argv[1])
''')


def asks_for_a_kill():
    return [Ask(f's{i}', 'labevents', i, 'decision', f'prompt {i}', 'plain') for i in range(100)]


@pytest.mark.parametrize('how', ['whole', 'one by one'])
def test_killed_and_resumed(file, how):
    here = os.path.dirname(__file__)
    command = [sys.executable, '-c', KILLED, str(file), how, here]
    process = subprocess.Popen(command)
    while not file.is_file() or file.read_bytes().count(b'\n') <= 30:
        assert process.poll() is None
        time.sleep(.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept, _, _ = file.read_bytes().rpartition(b'\n')
    had = kept.count(b'\n') + 1
    assert 30 < had < 100

    engine = Counting()
    engine.whole = how == 'whole'
    answered(asks_for_a_kill(), engine, file)
    assert file.read_bytes().startswith(kept)
    assert_each_once(file, 100)
    in_whole_batches = had//engine.batch*engine.batch
    known = in_whole_batches if engine.whole else had  # a batch that is computed together is asked as a whole
    assert len(engine.asked) == 100 - known


def test_two_runs_do_not_write_one_file(asks, file):
    class Nosy(Counting):
        def ask(self, *args):
            with pytest.raises(InferenceError, match='another run'):
                answered(asks, Counting(), file)
            yield from super().ask(*args)

    made = answered(asks, Nosy(), file)
    assert len(made) == len(asks)


@pytest.mark.parametrize('text, finish, status, said', [
    ('<think>\nso\n</think>\n\nSodium\nGlucose', 'stop', 'answered', ['Sodium', 'Glucose']),
    ('Sodium', 'stop', 'answered', ['Sodium']),
    ('<think>\nso', 'length', 'unclosed', []),
    ('<think>\nso\n</think>\n\n', 'stop', 'empty', []),
    ('', 'length', 'empty', []),
    ('Sodium\nGlu', 'length', 'cut', ['Sodium', 'Glu']),
    ('<think>a</think>x<think>', 'stop', 'unclosed', []),
    ('\x00\u2028\r\n', 'stop', 'empty', []),
])
def test_status_of_an_answer(file, text, finish, status, said):
    class Says(Counting):
        def ask(self, prompts, max_tokens=0):
            yield 0, Text(text, 3, 4, finish)

    decision = Ask('a', 'labevents', 1, 'decision', 'p', 'think')
    [line] = answered([decision], Says(), file, 9)
    assert line['status'] == status
    assert line['text'] == text
    prediction = predictions_of([line]).row(0, named=True)
    assert prediction['answer'] == said
    assert prediction['fallback'] == (None if status == 'answered' else status)
    assert prediction['risk'] is None


def test_broken_weights_are_an_error(tokenizer, asks, file):
    broken = new_model('tiny', tokenizer, 0, 1024)
    engine = Transformers(broken, tokenizer)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float('nan'))
    with pytest.raises(InferenceError, match='NaN'):
        answered(asks[:1], engine, file, 4)


def test_transformers_is_named_after_the_weights(model, tokenizer, folder):
    same = Transformers(model, tokenizer)
    other_weights = new_model('tiny', tokenizer, 1, 1024)
    other = Transformers(other_weights, tokenizer)
    assert Transformers(str(folder)).name == same.name != other.name


def test_vllm_is_named_after_the_files(folder):
    weights = folder/'model.safetensors'
    before, kept = VllmEngine(folder).name, weights.read_bytes()
    changed = bytearray(kept)
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert VllmEngine(folder).name != before
    weights.write_bytes(kept)
    assert VllmEngine(folder).name == before


# servers

LISTED = {
    'yes': math.log(.5),
    ' no': math.log(.2),
    'no\n': math.log(.05),
    'maybe': math.log(.1)}
RISK = Ask('a', 'Inpatient_Mortality', 1, 'risk', 'p', 'plain')


def completion_of(body, listed):
    "What a server of completions says; it always lists the same tokens."
    asked = json.loads(body)
    prompt = asked['prompt']
    if 'logprobs' in asked:
        said = dict(text='yes', finish_reason='length', logprobs=dict(top_logprobs=[listed]))
    else:
        said = dict(text=f'Sodium\n{prompt[-4:]}', finish_reason='stop')
    usage = dict(prompt_tokens=len(prompt), completion_tokens=2, total_tokens=9)
    reply = dict(
        id='1',
        object='text_completion',
        created=0,
        model='parrot',
        usage=usage,
        choices=[dict(index=0, **said)])
    return 200, JSON, json.dumps(reply)


def completion(method, path, body, headers):
    "Lists yes, no and two other tokens."
    return completion_of(body, LISTED)


def undecided(method, path, body, headers):
    "Lists neither yes nor no."
    return completion_of(body, dict(maybe=-.1))


def parrot(proxy, *more, **settings):
    "Asks the server behind a proxy."
    return ServerEngine(proxy.url, 'parrot', *more, **settings)


def test_server_lists_some_tokens_and_the_rest_is_bounded():
    with Proxy(completion) as proxy:
        [got] = parrot(proxy).p_yes(['what?'])
        asked = json.loads(proxy.seen[0])
    assert asked == dict(
        model='parrot',
        prompt='what?',
        temperature=0.,
        max_tokens=1,
        logprobs=20)
    assert got.yes == pytest.approx(.5)
    assert got.no == pytest.approx(.2)
    assert got.tokens == 5
    not_listed = 1 - .85
    most_of_ten = 10*.05
    assert got.outside == pytest.approx(min(not_listed, most_of_ten))
    assert .5/.85 < got.p < .65/.85


def test_a_risk_that_no_server_listed_is_missing(file):
    with Proxy(undecided) as proxy:
        [line] = answer([RISK], parrot(proxy), file, 9)
    assert line['status'] == 'unlisted'
    prediction = predictions_of([line]).row(0, named=True)
    assert prediction['risk'] is None
    assert prediction['fallback'] == 'unlisted'


def test_vllms_server_is_asked_with_token_ids(tokenizer):
    def exact(method, path, body, headers):
        tokens = json.loads(body)['logprob_token_ids']
        listed = {f'token_id:{token}': math.log(.1) for token in tokens}
        listed['token_id:0'] = math.log(.05)
        return completion_of(body, listed)

    yes, no = yes_no_tokens(tokenizer)
    with Proxy(exact) as proxy:
        [got] = parrot(proxy, tokenizer).p_yes(['yes'])
        asked = json.loads(proxy.seen[0])
    assert asked['prompt'] == tokenizer.encode('yes')
    assert got.outside == 0
    assert got.yes == pytest.approx(.1*len(yes))
    assert got.no == pytest.approx(.1*len(no))


def test_a_server_that_is_not_vllms_is_said(tokenizer):
    with Proxy(completion) as proxy:
        engine = parrot(proxy, tokenizer)
        with pytest.raises(InferenceError, match='for vLLM only'):
            engine.p_yes(['yes'])


def test_faults_of_a_server_lose_and_double_nothing(asks, file):
    outcomes = (*FAULTS, None)

    def fault(body, attempt):
        return outcomes[crc32(body) % 5] if attempt == 0 else None

    by_prompt = {ask.prompt: ask for ask in asks}
    different = list(by_prompt.values())[:24]
    with Proxy(completion, fault) as proxy:
        made = answered(different, parrot(proxy, concurrency=8), file, 9)
        assert len(proxy.faults) == 4
        assert set(proxy.delivered.values()) == {1}
    assert len(lines(file)) == 24
    texts = [line['text'] for line in made if line['kind'] == 'decision']
    assert texts == [f'Sodium\n{ask.prompt[-4:]}' for ask in decisions_among(different)]


def test_what_is_on_file_needs_no_server(asks, file):
    with Proxy(completion) as proxy:
        first = answered(asks[:9], parrot(proxy), file, 9)
        before = proxy.connections
        assert answered(asks[:9], parrot(proxy), file, 9) == first
        assert proxy.connections == before


def test_answers_of_a_server_are_kept_until_it_fails(asks, file):
    too_long = (400, JSON, '{"error": {"message": "prompt too long"}}')

    def some(*args):
        return completion(*args) if len(proxy.seen) < 15 else too_long

    with Proxy(some) as proxy:
        engine = parrot(proxy, concurrency=2)
        with pytest.raises(InferenceError, match='prompt too long'):
            answered(decisions_among(asks), engine, file, 9)
    assert 12 <= len(lines(file)) <= 15


NO_SUCH_PAGE = (404, JSON, '{"error": {"message": "Not Found"}}')
A_PAGE = (200, {'content-type': 'text/html'}, '<html>')
NO_CHOICE = (200, JSON, '{"choices": []}')
GO_ELSEWHERE = (302, {'location': 'http://evil.example/'}, '')


@pytest.mark.parametrize('reply, words', [
    (NO_SUCH_PAGE, 'takes no such requests at .*; most addresses end in /v1'),
    (A_PAGE, "answers with a page .'<html>'"),
    (NO_CHOICE, 'no answer'),
    (GO_ELSEWHERE, 'redirects to http://evil.example/, which is not followed'),
])
def test_what_a_server_cannot_do_is_said(reply, words):
    with Proxy(lambda *args: reply) as proxy:
        engine = parrot(proxy, max_retries=0)
        with pytest.raises(InferenceError, match=words):
            engine.generate(['p'], 3)


@pytest.fixture
def stranger(monkeypatch):
    "An engine far away, which answers without being asked really."
    def says_something(self, prompts, max_tokens=0):
        for place, _ in enumerate(prompts):
            yield place, Yes(.1, .1, 1)
    monkeypatch.delenv('EHR_R1_ALLOW', raising=False)
    monkeypatch.setattr(ServerEngine, 'ask', says_something)
    return ServerEngine('https://api.example.org/v1', 'big')


def test_text_is_credentialed_unless_said_otherwise(stranger, file):
    with pytest.raises(Refused, match='nothing was sent'):
        answer([RISK], stranger, file, 9)
    assert not file.exists()


def test_credentialed_text_goes_to_no_stranger(stranger, file):
    with pytest.raises(Refused, match='mimic-iv-3.1'):
        answer([RISK], stranger, file, 9, 'mimic-iv-3.1', 'credentialed')
    assert not file.exists()


def test_credentialed_text_goes_where_it_may(stranger, file, monkeypatch):
    monkeypatch.setenv('EHR_R1_ALLOW', 'mimic-iv-3.1@api.example.org')
    made = answer([RISK], stranger, file, 9, 'mimic-iv-3.1', 'credentialed')
    assert len(made) == 1


def test_a_permission_is_for_one_data_set(stranger, file, monkeypatch):
    monkeypatch.setenv('EHR_R1_ALLOW', 'mimic-iv-3.1@api.example.org')
    with pytest.raises(Refused):
        answer([RISK], stranger, file, 9, 'mimic-iv-2.2', 'credentialed')
    assert not file.exists()


def test_vllm_missing_is_said(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, 'vllm', None)
    with pytest.raises(InferenceError, match='install vllm'):
        VllmEngine(folder).p_yes(['p'])


def test_vllm_takes_no_adapter(tmp_path):
    (tmp_path/'adapter_config.json').write_text('{}')
    with pytest.raises(InferenceError, match='merge it'):
        VllmEngine(tmp_path)
