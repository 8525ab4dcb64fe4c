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


def ids_of(tokenizer, prompt):
    "A prompt as a batch of one."
    return torch.tensor([tokenizer.encode(prompt)])


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
    assert len({round(risk.p, 4) for risk in risks}) > 20
    assert len({text.text for text in texts}) > 10
    assert {text.finish for text in texts} == {'stop', 'length'}


@pytest.fixture(scope='module', params=[2_000, 9_000, 100_000, 'apart'])
def batched(request, model, tokenizer):
    "Asks prompts in batches of so many slots; the last one shares nothing."
    if request.param == 'apart':
        return Transformers(model, tokenizer, slots=9_000, share=False)
    return Transformers(model, tokenizer, slots=request.param)


def test_batching_changes_no_number(batched, tokenizer, prompts, risks):
    assert max(len(batch) for batch in batched.plan(prompts)) > 2
    got = batched.p_yes(prompts)
    assert [risk.tokens for risk in got] == [len(tokenizer.encode(prompt)) for prompt in prompts]
    for ours, alone in zip(got, risks):
        assert abs(ours.yes - alone.yes) + abs(ours.no - alone.no) < 1e-5
        assert abs(ours.p - alone.p) < 1e-4


def test_batching_changes_no_word(batched, prompts, texts):
    assert batched.generate(prompts, 12) == texts


@pytest.mark.parametrize('place', range(8))
def test_words_are_those_of_transformers_own_generate(model, tokenizer, prompts, place):
    [ours] = Transformers(model, tokenizer).generate(prompts[place:place + 1], 12)
    ids = ids_of(tokenizer, prompts[place])
    tokens = ids.shape[1]
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=12, do_sample=False)
    written = out[0, tokens:].tolist()
    ended = tokenizer.eos_token_id in written
    text = tokenizer.decode(written[:-1] if ended else written)
    assert ours == Text(text, tokens, len(written), 'stop' if ended else 'length')


SAYS_YES = ('yes', 'Yes', 'YES', ' yes', ' Yes', ' YES')
SAYS_NO = ('no', 'No', 'NO', ' no', ' No', ' NO')


def test_p_yes_is_the_softmax_over_the_whole_vocabulary(model, tokenizer, prompts):
    words = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    yes = [i for i, word in enumerate(words) if word in SAYS_YES]
    no = [i for i, word in enumerate(words) if word in SAYS_NO]
    assert yes_no_tokens(tokenizer) == (yes, no)
    assert len(yes) > 1
    with torch.no_grad():
        out = model(ids_of(tokenizer, prompts[0]))
    p = out.logits[0, -1].double().softmax(0)
    [got] = Transformers(model, tokenizer).p_yes(prompts[:1])
    assert got.yes == pytest.approx(p[yes].sum().item(), rel=1e-5)
    assert got.no == pytest.approx(p[no].sum().item(), rel=1e-5)
    assert got.p == got.yes/(got.yes + got.no)
    assert got.outside == 0


def test_end_token_ends_a_row_and_not_its_neighbours(model, tokenizer, prompts):
    plain = Transformers(model, tokenizer).generate(prompts, 12)
    engine = Transformers(model, tokenizer)
    for prompt in prompts[1:6:2]:  # a word that stands fourth, somewhere else in other answers
        with torch.no_grad():
            written = model.generate(ids_of(tokenizer, prompt), max_new_tokens=4, do_sample=False)
        engine.ends = engine.ends | {written[0, -1].item()}
    got = engine.generate(prompts, 12)
    stopped = [text for text in got if text.finish == 'stop']
    assert len(stopped) >= 3
    assert len({text.new_tokens for text in stopped}) > 1
    assert any(text.finish == 'length' for text in got)
    for unended, text in zip(plain, got):
        assert unended.text.startswith(text.text) or '�' in text.text  # half a character


def test_one_token_is_one_token(model, tokenizer, prompts):
    texts = Transformers(model, tokenizer).generate(prompts[:5], 1)
    assert [text.new_tokens for text in texts] == [1]*5


def test_no_prompts_have_no_answers(alone):
    assert alone.generate([], 5) == []
    assert alone.p_yes([]) == []


def test_an_empty_prompt_is_an_error(alone):
    with pytest.raises(InferenceError, match='empty prompt'):
        alone.p_yes([''])


small_row = st.lists(st.integers(0, 2), min_size=1, max_size=7)
smaller_row = st.lists(st.integers(0, 1), min_size=1, max_size=5)


@given(st.lists(small_row, max_size=12), st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_groups_hold_every_prompt_once_and_what_they_say_they_share(rows, most):
    groups = shared_prefixes(rows, most, worth=1)
    assert sorted(place for group in groups for place in group.places) == list(range(len(rows)))
    for prefix, places in groups:
        members = [rows[place] for place in places]
        assert len({tuple(row[:prefix]) for row in members}) == 1
        assert prefix < min(map(len, members))
        assert (prefix == 0) == (len(members) == 1)
        assert len(members) == 1 or len(members)*max(map(len, members)) <= most


@given(st.lists(smaller_row, min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_no_other_cut_of_the_sorted_prompts_saves_more(rows):
    order = sorted(rows)

    def saved(group):
        prefix = min(len(os.path.commonprefix(group)), min(map(len, group)) - 1)
        return (len(group) - 1)*prefix

    def best_from(begin):
        ends = range(begin + 1, len(order) + 1)
        return max((saved(order[begin:end]) + best_from(end) for end in ends), default=0)

    groups = shared_prefixes(rows, 10**9, worth=1)
    assert sum(prefix*(len(places) - 1) for prefix, places in groups) == best_from(0)


@pytest.mark.parametrize('slots', [1_500, 4_000, 20_000])
def test_batches_hold_every_prompt_once_and_keep_to_the_slots(model, tokenizer, prompts, slots):
    plan = Transformers(model, tokenizer, slots=slots).plan(prompts, 10)
    assert sorted(place for batch in plan for place in batch) == list(range(len(prompts)))
    for batch in plan:
        longest = max(len(tokenizer.encode(prompts[place])) for place in batch)
        assert len(batch) == 1 or len(batch)*longest <= slots


def test_a_tokenizer_without_yes_is_refused():
    class Letters:
        def encode(self, text, add_special_tokens):
            return [ord(letter) for letter in text]
    with pytest.raises(InferenceError, match="no token for 'yes'"):
        yes_no_tokens(Letters())


# asks


@pytest.mark.parametrize('mode, of_risks', [('plain', 'plain'), ('think', 'no_think'), ('no_think', 'no_think')])
def test_risk_questions_are_never_asked_with_thinking(samples, writer, mode, of_risks):
    made = asks_of(samples, writer, mode)
    assert {ask.mode for ask in made if ask.kind == 'decision'} == {mode}
    assert {ask.mode for ask in made if ask.kind == 'risk'} == {of_risks}
    assert all(ask.prompt.rstrip().endswith('</think>') == (ask.mode != 'think') for ask in made)


def test_an_ask_is_a_rendered_sample(samples, writer, tokenizer):
    sample = samples.row(0, named=True)
    [ask] = asks_of(samples.head(1), writer, 'think')
    assert ask.prompt == chat_text(tokenizer, sample['messages'], 'no_think')
    assert (ask.sample_id, ask.task, ask.dropped) == ('s000', sample['task'], 0)


def test_long_records_are_cut_and_counted(samples, tokenizer):
    made = asks_of(samples, Writer(tokenizer, 100, 24), 'plain')
    assert sum(ask.dropped > 0 for ask in made) > 5
    assert all(len(tokenizer.encode(ask.prompt)) <= 100 for ask in made)
    assert all('## Patient' in ask.prompt for ask in made)
    assert all(TASKS[ask.task].instruction in ask.prompt for ask in made)


# answers


class Counting(Engine):
    "Answers at once, and remembers what it was asked."
    name, batch = 'counting', 8

    def __init__(self):
        self.asked = []

    def ask(self, prompts, max_tokens=0):
        for place, prompt in enumerate(prompts):
            self.asked.append(prompt)
            yield place, Text(f'Sodium\nline {len(prompt)}', 10, 5, 'stop') if max_tokens else Yes(.3, .1, 10)


def test_answers_come_in_the_order_of_the_asks(asks, file):
    made = answered(asks, Counting(), file)
    said = [(line['sample_id'], line['task'], line['kind'], line['mode']) for line in made]
    assert said == [(ask.sample_id, ask.task, ask.kind, ask.mode) for ask in asks]


def test_answers_make_predictions_that_are_scored(samples, asks, file):
    made = predictions_of(answered(asks, Counting(), file))
    assert set(made.filter(task='Inpatient_Mortality')['risk']) == {.3/(.3 + .1)}
    assert made['fallback'].null_count() == len(made)
    scores = score_all(samples, dict(counting=made), replicates=20)
    assert scores.filter(metric='f1', task='overall')['value'][0] == .5  # one of two lines


def test_no_asks_have_no_answers(file):
    assert answered([], Counting(), file) == []
    assert predictions_of([]).height == 0


def test_digests_are_what_earlier_runs_kept_answers_under(file):
    asked = [Ask('s1', 'Inpatient_Mortality', 7, 'risk', 'Will the patient die?', 'no_think'),
             Ask('s2', 'labevents', 7, 'decision', 'Name the tests to come.', 'think')]
    answered(asked, Counting(), file, 16)
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
    assert len(engine.asked) == len([ask for ask in asks if ask.kind == 'decision'])


def test_another_prompt_is_asked(asks, file):
    engine = Counting()
    answered(asks[:1], engine, file)
    answered([replace(asks[0], prompt='another')], engine, file)
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
    command = [sys.executable, '-c', KILLED, str(file), how, os.path.dirname(__file__)]
    process = subprocess.Popen(command)
    while not (file.is_file() and file.read_bytes().count(b'\n') > 30):
        assert process.poll() is None
        time.sleep(.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = file.read_bytes().rpartition(b'\n')[0]
    had = kept.count(b'\n') + 1
    assert 30 < had < 100

    engine = Counting()
    engine.whole = how == 'whole'
    answered(asks_for_a_kill(), engine, file)
    assert file.read_bytes().startswith(kept)
    assert_each_once(file, 100)
    known = had//8*8 if engine.whole else had  # of a batch that is computed together all is asked, else what lacked
    assert len(engine.asked) == 100 - known


def test_two_runs_do_not_write_one_file(asks, file):
    class Nosy(Counting):
        def ask(self, *args):
            with pytest.raises(InferenceError, match='another run'):
                answered(asks, Counting(), file)
            yield from super().ask(*args)
    assert len(answered(asks, Nosy(), file)) == len(asks)


@pytest.mark.parametrize('text, finish, status, said', [
    ('<think>\nso\n</think>\n\nSodium\nGlucose', 'stop', 'answered', ['Sodium', 'Glucose']),
    ('Sodium', 'stop', 'answered', ['Sodium']),
    ('<think>\nso', 'length', 'unclosed', []),
    ('<think>\nso\n</think>\n\n', 'stop', 'empty', []),
    ('', 'length', 'empty', []),
    ('Sodium\nGlu', 'length', 'cut', ['Sodium', 'Glu']),
    ('<think>a</think>x<think>', 'stop', 'unclosed', []),
    ('\x00\u2028\r\n', 'stop', 'answered', ['\x00'])])
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
    with torch.no_grad():
        broken.model.norm.weight.fill_(float('nan'))
    with pytest.raises(InferenceError, match='NaN'):
        answered(asks[:1], Transformers(broken, tokenizer), file, 4)


def test_transformers_is_named_after_the_weights(model, tokenizer, folder):
    same = Transformers(model, tokenizer)
    other = Transformers(new_model('tiny', tokenizer, 1, 1024), tokenizer)
    assert Transformers(str(folder)).name == same.name != other.name


def test_vllm_is_named_after_the_files(folder):
    weights = folder/'model.safetensors'
    before, kept = VllmEngine(folder).name, weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    assert VllmEngine(folder).name != before
    weights.write_bytes(kept)
    assert VllmEngine(folder).name == before


# servers

LISTED = {'yes': .5, ' no': .2, 'no\n': .05, 'maybe': .1}
TOP = {token: math.log(p) for token, p in LISTED.items()}
RISK = Ask('a', 'Inpatient_Mortality', 1, 'risk', 'p', 'plain')


def completion_of(body, top):
    "What a server of completions says; it always lists the same tokens."
    asked = json.loads(body)
    choice = dict(index=0, text=f"Sodium\n{asked['prompt'][-4:]}", finish_reason='stop')
    if 'logprobs' in asked:
        choice = dict(index=0, text='yes', finish_reason='length', logprobs=dict(top_logprobs=[top]))
    usage = dict(prompt_tokens=len(asked['prompt']), completion_tokens=2, total_tokens=9)
    about = dict(id='1', object='text_completion', created=0, model='parrot')
    return 200, JSON, json.dumps(about | dict(usage=usage, choices=[choice]))


def completion(method, path, body, headers):
    "Lists yes, no and two other tokens."
    return completion_of(body, TOP)


def undecided(method, path, body, headers):
    "Lists neither yes nor no."
    return completion_of(body, dict(maybe=-.1))


def test_server_lists_some_tokens_and_the_rest_is_bounded():
    with Proxy(completion) as proxy:
        [got] = ServerEngine(proxy.url, 'parrot').p_yes(['what?'])
        asked = json.loads(proxy.seen[0])
    assert asked == dict(model='parrot', prompt='what?', temperature=0., max_tokens=1, logprobs=20)
    assert got.yes == pytest.approx(.5)
    assert got.no == pytest.approx(.2)
    assert got.tokens == 5
    assert got.outside == pytest.approx(min(1 - .85, 10*.05))
    assert .5/.85 < got.p < .65/.85


def test_a_risk_that_no_server_listed_is_missing(file):
    with Proxy(undecided) as proxy:
        [line] = answer([RISK], ServerEngine(proxy.url, 'parrot'), file, 9)
    assert line['status'] == 'unlisted'
    prediction = predictions_of([line]).row(0, named=True)
    assert prediction['risk'] is None
    assert prediction['fallback'] == 'unlisted'


def test_vllms_server_is_asked_with_token_ids(tokenizer):
    def exact(method, path, body, headers):
        named = {f'token_id:{i}': math.log(.1) for i in json.loads(body)['logprob_token_ids']}
        return completion_of(body, named | {'token_id:0': math.log(.05)})
    yes, no = yes_no_tokens(tokenizer)
    with Proxy(exact) as proxy:
        [got] = ServerEngine(proxy.url, 'parrot', tokenizer).p_yes(['yes'])
        assert json.loads(proxy.seen[0])['prompt'] == tokenizer.encode('yes')
    assert got.outside == 0
    assert got.yes == pytest.approx(.1*len(yes))
    assert got.no == pytest.approx(.1*len(no))


def test_a_server_that_is_not_vllms_is_said(tokenizer):
    with Proxy(completion) as proxy, pytest.raises(InferenceError, match='for vLLM only'):
        ServerEngine(proxy.url, 'parrot', tokenizer).p_yes(['yes'])


def test_faults_of_a_server_lose_and_double_nothing(asks, file):
    def fault(body, attempt):
        return (*FAULTS, None)[crc32(body) % 5] if attempt == 0 else None
    asks = list({ask.prompt: ask for ask in asks}.values())[:24]
    with Proxy(completion, fault) as proxy:
        made = answered(asks, ServerEngine(proxy.url, 'parrot', concurrency=8), file, 9)
        assert len(proxy.faults) == 4
        assert set(proxy.delivered.values()) == {1}
    assert len(lines(file)) == 24
    texts = [line['text'] for line in made if line['kind'] == 'decision']
    assert texts == [f'Sodium\n{ask.prompt[-4:]}' for ask in asks if ask.kind == 'decision']


def test_what_is_on_file_needs_no_server(asks, file):
    with Proxy(completion) as proxy:
        first = answered(asks[:9], ServerEngine(proxy.url, 'parrot'), file, 9)
        before = proxy.connections
        assert answered(asks[:9], ServerEngine(proxy.url, 'parrot'), file, 9) == first
        assert proxy.connections == before


def test_answers_of_a_server_are_kept_until_it_fails(asks, file):
    def some(*args):
        return completion(*args) if len(proxy.seen) < 15 else (400, JSON, '{"error": {"message": "prompt too long"}}')
    decisions = [ask for ask in asks if ask.kind == 'decision']
    with Proxy(some) as proxy, pytest.raises(InferenceError, match='prompt too long'):
        answered(decisions, ServerEngine(proxy.url, 'parrot', concurrency=2), file, 9)
    assert 12 <= len(lines(file)) <= 15


@pytest.mark.parametrize('reply, words', [
    ((404, JSON, '{"error": {"message": "Not Found"}}'), 'takes no such requests at .*; most addresses end in /v1'),
    ((200, {'content-type': 'text/html'}, '<html>'), "answers with a page .'<html>'"),
    ((200, JSON, '{"choices": []}'), 'no answer'),
    ((302, {'location': 'http://evil.example/'}, ''), 'redirects to http://evil.example/, which is not followed')])
def test_what_a_server_cannot_do_is_said(reply, words):
    with Proxy(lambda *args: reply) as proxy, pytest.raises(InferenceError, match=words):
        ServerEngine(proxy.url, 'parrot', max_retries=0).generate(['p'], 3)


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
    assert len(answer([RISK], stranger, file, 9, 'mimic-iv-3.1', 'credentialed')) == 1


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
