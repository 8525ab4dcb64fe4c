"""Rewards: won and lost as specified, the same as the benchmark's score, and calm before any text."""
import json
import math
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ehr_r1.scoring import parse_answer, set_f1
from ehr_r1.synthesis import filters, reasoning, support
from ehr_r1.synthesis.thinking_graph import ThinkingGraph
from ehr_r1.training.rewards import (
    _BRACKETS,
    LONGEST,
    THINK_SECTIONS,
    accuracy_reward,
    ehrmind_answer,
    ehrmind_reward,
    fault_of_format,
    format_reward,
    grpo_rewards,
)

CHAIN = """## Extraction
**Labs [2130-04-02 08:00]**: Potassium 2.9
## Reasoning
It is low.
## Final Results
Potassium"""
TAGS = [
    '<think>', '</think>', '<answer>', '</answer>',
    *(f'\n## {section}\n' for section in THINK_SECTIONS), '##',
    '\n', '\r', ' ', 'yes', 'no', 'Potassium',
    '{"answer": 1}', '{', '[', '"', '\\', '1e999', 'NaN',
    '\x00', '\x1b', '\ud800', '\u2028', '\ufeff', 'ß', '\x85',
]
PIECE = st.sampled_from(TAGS) | st.text(max_size=3)
ANY = st.text(st.characters(codec=None)) | st.lists(PIECE, max_size=30).map(''.join)
LETTERS = st.characters(categories=['Lu', 'Ll', 'Nd'])
WORD = st.text(LETTERS, min_size=1, max_size=8)
LINES = st.lists(WORD, min_size=1, max_size=6, unique_by=str.casefold)


def said(*answer, chain=CHAIN):
    return f'<think>\n{chain}\n</think>\n\n' + '\n'.join(answer)


def always(answer):
    return True


# --- any text

@given(ANY, LINES)
def test_any_text_earns_an_allowed_accuracy(text, gold):
    assert 0 <= accuracy_reward(text, gold, 'decision') <= 1
    assert accuracy_reward(text, ['yes'], 'risk') in (0, 1)


@pytest.mark.parametrize('sections', [True, False])
@given(text=ANY)
def test_any_text_without_a_fault_earns_the_format(sections, text):
    assert format_reward(text, sections) == (-1 if fault_of_format(text, sections) else 1)


@given(ANY)
def test_a_judge_sees_what_is_well_formed_and_nothing_else(text):
    seen = []

    def judge(answer):
        seen.append(answer)
        return answer['answer'] == 1

    earned = ehrmind_reward(text, judge, ('answer',))
    assert earned in (-2, 0, 1.1)
    assert (earned == -2) == (not seen)


JSON_PARTS = [
    '{"answer": ', '"prediction": ', '}', '[', ']', ', ',
    '1', '-', '1e9', '1e999', 'NaN', 'null', 'true', '"a"', '"\\ud800"',
]


@given(st.lists(st.sampled_from(JSON_PARTS)))
def test_any_json_is_read_or_refused(parts):
    answer = ehrmind_answer(f'<think>t</think><answer>{"".join(parts)}</answer>', ('answer',))
    if answer is not None:
        assert set(answer) == {'answer'}
        assert json.dumps(answer, allow_nan=False, ensure_ascii=False).encode()


TITLED = [part for section in THINK_SECTIONS for part in (f'## {section}\n', 'x\n')]
AS_TAUGHT = ['<think>\n', *TITLED, '</think>\n', 'a\n', 'b\n']
EDITS = st.lists(st.sampled_from(['drop', 'double', 'move']), max_size=3)


@st.composite
def edited(draw):
    "A completion as taught, with up to three pieces dropped, doubled or moved."
    pieces = list(AS_TAUGHT)
    for edit in draw(EDITS):
        at = draw(st.integers(0, len(pieces) - 1))
        to = draw(st.integers(0, len(pieces) - 1))
        piece = pieces[at] if edit == 'double' else pieces.pop(at)
        if edit != 'drop':
            pieces.insert(to, piece)
    return pieces


def is_mark(piece):
    return piece[0] in '<#'


def as_asked(pieces):
    "Whether a completion has the marks in order, first of all the block, and behind it an answer without repetition."
    marks, asked = [list(filter(is_mark, some)) for some in (pieces, AS_TAUGHT)]
    if marks[:len(asked)] != asked or pieces[0] != asked[0]:
        return False
    answer = pieces[pieces.index('</think>\n') + 1:]
    if any('think' in piece for piece in answer):
        return False
    return len(set(answer)) == len(answer) > 0


@given(edited())
def test_the_format_is_met_by_exactly_what_it_asks_for(pieces):
    assert (format_reward(''.join(pieces)) == 1) == as_asked(pieces)


@pytest.mark.parametrize('text', ['', None, ' \n'])
def test_nothing_said_earns_nothing(text):
    assert accuracy_reward(text, ['no'], 'risk') == 0
    assert format_reward(text) == -1
    assert ehrmind_reward(text, always, ('answer',)) == -2


# --- what the released code gets wrong: a format that nobody can pass, risk answers that always earn 0

BODY = st.text(st.characters(exclude_characters='<#\n', codec='utf-8'))


@given(LINES, st.lists(BODY, min_size=3, max_size=3))
def test_whoever_does_as_taught_earns_both(gold, bodies):
    chain = '\n'.join(f'## {section}\n{body}' for section, body in zip(THINK_SECTIONS, bodies))
    text = said(*gold, chain=chain)
    assert fault_of_format(text) == ''
    assert accuracy_reward(text, gold, 'decision') == 1


RISKS = [('yes', 'no'), ('no', 'yes')]


@pytest.mark.parametrize('gold, other', RISKS)
def test_a_risk_is_won_by_the_right_word(gold, other):
    for right in (gold, gold.upper(), f' {gold.title()} '):
        assert accuracy_reward(said(right), [gold], 'risk') == 1


@pytest.mark.parametrize('gold, other', RISKS)
def test_a_risk_is_lost_by_anything_else(gold, other):
    both, unsure = [gold, other], [f'{gold} {other}']
    for lines in ([other], both, [gold, gold], [f'{gold}.'], unsure, [gold[0]], []):
        assert accuracy_reward(said(*lines), [gold], 'risk') == 0


@pytest.mark.parametrize('gold, other', RISKS)
def test_a_risk_is_lost_without_a_closed_block(gold, other):
    assert accuracy_reward(gold, [gold], 'risk') == 0
    assert accuracy_reward(f'<think>{gold}', [gold], 'risk') == 0


@pytest.fixture(scope='module')
def case():
    record = '## Labs [2130-04-02 08:00]\n- Potassium 2.9 mmol/L\n- Sodium 138 mmol/L'
    return reasoning.Brief('a', 'labevents', record, ('Potassium', 'Magnesium'),
                           ThinkingGraph('a', 'labevents', ('Potassium', 'Magnesium'), ()))


def test_a_chain_of_the_teacher_passes_the_filters(case):
    chain = reasoning.verbalise(case, 'no_knowledge')
    events = support.read_record(case.record, 'compact')
    assert filters.fault_of(chain, case.answers, events, 'no_knowledge') == ''


@pytest.mark.parametrize('old, new', [
    ('', ''),
    ('## ', '##'),
    ('## Reasoning', '##  Reasoning :'),
    ('\n', '\r\n'),
])
def test_a_chain_that_the_filters_can_read_passes_the_format(case, old, new):
    chain = reasoning.verbalise(case, 'no_knowledge')
    chain = chain.replace(old, new) if old else chain
    assert list(support.read_chain(chain)) == list(THINK_SECTIONS)
    assert fault_of_format(said(*case.answers, chain=chain)) == ''


def test_a_chain_without_sections_passes_where_none_are_asked_for(case):
    text = said(*case.answers, chain=reasoning.verbalise(case, 'no_sections'))
    assert fault_of_format(text) == 'section missing'
    assert format_reward(text, sections=False) == 1


def test_sections_are_those_of_the_chains():
    assert THINK_SECTIONS == filters.SECTIONS


# --- accuracy

@given(LINES, LINES, ANY)
def test_accuracy_is_the_score_of_the_benchmark(gold, answer, chain):
    text = said(*answer, chain=chain)
    lines = parse_answer(text).lines
    score = set_f1(gold, lines) if lines else 0
    assert accuracy_reward(text, gold, 'decision') == score


@pytest.mark.parametrize('text, gold, earned', [
    ('Potassium <think>Potassium</think>\nSodium', ['Potassium'], 0),
    ('<think>a</think>\nSodium\n<think>b</think>\nPotassium', ['Potassium'], 1),
    ('<think>a</think>\nPotassium\n<think>', ['Potassium'], 0),
    ('the template opened it</think>\nPotassium', ['Potassium'], 1),
    ('<think>a', [], 0),
    ('<think>a</think>', [], 0),
])
def test_only_what_follows_the_last_block_counts(text, gold, earned):
    assert accuracy_reward(text, gold, 'decision') == earned


@pytest.mark.parametrize('gold', [[], ['Yes'], ['1'], ['yes', 'no']])
def test_a_label_that_cannot_be_met_is_an_error(gold):
    with pytest.raises(ValueError, match='yes'):
        accuracy_reward(said('yes'), gold, 'risk')


def test_a_family_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match='decision or risk'):
        accuracy_reward(said('yes'), ['yes'], 'Risk')


# --- format

A, B, C = (f'## {section}\nx\n' for section in THINK_SECTIONS)
TITLES_AS_ANSWER = [f'## {section}' for section in THINK_SECTIONS]


@pytest.mark.parametrize('text, fault', [
    ('Potassium', 'no think block'),
    (f'{CHAIN}\n</think>\nPotassium', 'think block not opened'),
    ('a' + said('b'), 'text before the think block'),
    ('</think><think>', 'text before the think block'),
    (f'<think>\n{CHAIN}\nPotassium', 'think block not closed'),
    ('<think><think>', 'think block not closed'),
    (said('a', chain=f'<think>\n{CHAIN}\n</think>'), 'nested think block'),
    (said('a') + said('b'), 'more than one think block'),
    (said('a') + '<think>', 'more than one think block'),
    (said('a</think>b'), 'more than one think block'),
    (said('a', chain=A + B), 'section missing'),
    (said('a', chain=A + B + C + A), 'section repeated'),
    (said('a', chain=B + A + C), 'sections out of order'),
    (said(*TITLES_AS_ANSWER, chain='x'), 'section missing'),
    (said('a', chain=A + B + '### Final Results\n'), 'section missing'),
    (said('a', chain=A + B + '## final results\n'), 'section missing'),
    (said('a', chain=A + B + 'so: ## Final Results\n'), 'section missing'),
    (f'<think>{A + B + C}</think>a', 'section missing'),
    (f'<think>\n{A + B}## Final Results</think>a', 'section missing'),
    (said(chain=A + B + C), 'empty answer'),
    (said(' \r\n\t', chain=A + B + C), 'empty answer'),
    (said('a', 'b', ' A '), 'repeated line'),
    (said('ß', 'SS'), 'repeated line'),
    (said('a', 'b'), ''),
    ('\n ' + said('a\r\nb\r\n'), ''),
    (said('## Extraction'), ''),
    (said('a', chain=A + '## Plan\n' + B + C), ''),
])
def test_the_fault_is_named(text, fault):
    assert fault_of_format(text) == fault
    assert format_reward(text) == (-1 if fault else 1)
    if 'section' in fault:
        assert fault_of_format(text, sections=False) == ''


# --- as TRL calls them

TEXTS = [said('a', 'c'), said('no'), 'yes']
MESSAGES = [[dict(role='assistant', content=text)] for text in TEXTS]
BATCH = dict(
    label=[['a', 'b'], ['no'], ['yes']],
    family=['decision', 'risk', 'risk'],
    prompts=['p']*3,
    completion_ids=[[1]]*3,
    task=['t']*3,
    trainer_state=None,
    log_extra=None,
    log_metric=None,
)


def test_trl_logs_them_by_name():
    assert [reward.__name__ for reward in grpo_rewards()] == ['accuracy', 'format']


@pytest.mark.parametrize('completions', [TEXTS, MESSAGES], ids=['text', 'messages'])
def test_trl_gets_what_it_wants(completions):
    accuracy, form = grpo_rewards()
    assert accuracy(completions=completions, **BATCH) == [.5, 1, 0]
    assert form(completions=completions, **BATCH) == [1, 1, -1]


def test_an_assistant_that_says_nothing_earns_nothing():
    accuracy, _ = grpo_rewards()
    silent = [[dict(role='assistant', content=None)]]
    assert accuracy(completions=silent, label=[['no']], family=['risk']) == [0]


def test_columns_of_another_length_are_an_error():
    accuracy, _ = grpo_rewards()
    with pytest.raises(ValueError):
        accuracy(completions=TEXTS, label=BATCH['label'][:2], family=BATCH['family'])


@pytest.mark.parametrize('number', [0, 1], ids=['accuracy', 'format'])
def test_a_chain_that_was_split_off_is_an_error(number):
    reward = grpo_rewards()[number]
    split = [[dict(role='assistant', content='no', reasoning_content=CHAIN)]]
    with pytest.raises(ValueError, match='prompts as text'):
        reward(completions=split, label=[['no']], family=['risk'])


# --- EHRMind

RIGHT = '{"idx": "NCT1", "prediction": "Eligible"}'
EXCLUDED = RIGHT.replace('Eligible', 'Excluded')


def is_eligible(answer):
    return answer['prediction'] == 'Eligible'


def mind(body, before='<think>t</think>\n', after='', judge=is_eligible):
    return ehrmind_reward(f'{before}<answer>{body}</answer>{after}', judge, ('prediction', 'idx'))


def with_idx(value):
    return f'{{"idx": {value}, "prediction": "Eligible"}}'


@pytest.mark.parametrize('around', [
    dict(),
    dict(before=' \n<think></think>'),
    dict(after=' \n'),
    dict(body=f'\n{RIGHT}\n'),
])
def test_a_right_answer_earns_more_than_1(around):
    assert mind(**dict(body=RIGHT) | around) == 1.1


@pytest.mark.parametrize('body', [EXCLUDED, '{"idx": 1, "prediction": true}', '{"idx": -0.5e3, "prediction": ""}'])
def test_a_wrong_answer_earns_0(body):
    assert mind(body) == 0


@pytest.mark.parametrize('around', [
    dict(before=''),
    dict(before='x<think>t</think>'),
    dict(before='<think>t</think>x'),
    dict(before='<think>t'),
    dict(before='t</think>'),
    dict(before='<think>t</think><think>t</think>'),
    dict(before='<think><think>t</think></think>'),
    dict(before='</think><think>'),
    dict(before='<think>t</think><answer>'),
    dict(before=f'<think><answer>{RIGHT}</answer></think>'),
    dict(after='.'),
    dict(after=f'<answer>{RIGHT}</answer>'),
    dict(after='<think>t</think>', before=''),
])
def test_text_around_the_blocks_is_malformed(around):
    assert mind(RIGHT, **around) == -2


@pytest.mark.parametrize('body', [
    '',
    'Eligible',
    'null',
    f'[{RIGHT}]',
    '{"prediction": "Eligible"}',
    RIGHT[:-1] + ', "more": 1}',
    RIGHT[:-1],
    RIGHT + RIGHT,
    RIGHT.replace('"', "'"),
    '{"idx": 1, "idx": 1, "prediction": "Eligible"}',
    '{"idx": 1, "prediction": "Excluded", "prediction": "Eligible"}',
    '{"idx": 1, "prediction": ["Eligible"]}',
    with_idx('{}'),
    with_idx('null'),
    with_idx('"\x00"'),
    with_idx('"\\udc00"'),
    with_idx('"\ud800"'),
    with_idx(f'"{"x"*LONGEST}"'),
    '\ufeff' + RIGHT,
])
def test_another_object_is_malformed(body):
    assert mind(body) == -2


NO_NUMBERS = ['NaN', 'Infinity', '-Infinity', '1e999', '-1e999', '01', '+1', '.5', '0x1']


@pytest.mark.parametrize('number', [*NO_NUMBERS, '9'*400, '-' + '9'*5000], ids=lambda number: number[:8])
def test_a_number_that_is_none_is_malformed(number):
    assert mind(with_idx(number)) == -2


@pytest.mark.parametrize('text', [
    f'<think></answer></think><answer>{RIGHT}',
    f'<think>t</think></answer>{RIGHT}<answer>',
    f'<think>t</think><answer>{RIGHT}',
])
def test_an_answer_that_was_closed_before_it_began_is_malformed(text):
    assert ehrmind_reward(text, always, ('prediction', 'idx')) == -2


@pytest.mark.parametrize('depth', [_BRACKETS - 1, _BRACKETS + 1, 4_000])
@pytest.mark.parametrize('opening, closing', ['[]', ('{"a":', '}')])
def test_deep_json_is_malformed(depth, opening, closing):
    nested = opening*depth + '1' + closing*depth
    if depth*len(opening) < LONGEST:
        assert mind(with_idx(nested)) == -2
    assert mind(opening*depth) == -2


STORABLE = st.text(st.characters(codec='utf-8'), max_size=50)
ONE_LINE = STORABLE.filter(lambda text: '<' not in text)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
NUMBER = st.integers(-10**300, 10**300) | FINITE


@given(ONE_LINE | st.booleans() | NUMBER)
def test_a_single_value_comes_back_as_it_was_written(value):
    found = ehrmind_answer(f'<think>t</think><answer>{json.dumps(dict(answer=value))}</answer>', ('answer',))
    if str(value).count('[') + str(value).count('{') < _BRACKETS:
        assert found == dict(answer=value)
        assert type(found['answer']) is type(value)
    if isinstance(value, int):
        assert math.isfinite(float(found['answer']))


def test_a_judge_that_fails_is_heard():
    with pytest.raises(KeyError):
        mind(RIGHT, judge=lambda answer: answer['answer'])


# --- cost

def block(body):
    return f'<think>t</think><answer>{body}</answer>'


N = 10_000_000
COSTLY = dict(  # texts of about N characters that cost much if read carelessly, made when they are needed
    opening=lambda: '<think>'*(N//7),
    closing=lambda: '<think>' + '</think>'*(N//8),
    pairs=lambda: '<think></think>'*(N//15),
    space=lambda: ' '*N,
    newlines=lambda: '<think>' + '\n'*N,
    before=lambda: '\n'*N + said('a'),
    blanks=lambda: said('a', chain='## Extraction' + ' '*N + 'x'),
    tabs=lambda: said('a', chain='## Extraction' + '\t \r'*(N//3) + ':'),
    colons=lambda: said('a', chain='## Extraction' + ' :'*(N//2)),
    hashes=lambda: said('a', chain='##\n'*(N//3)),
    titles=lambda: said('a', chain='## Extraction\n'*(N//14)),
    near=lambda: said('a', chain='## Extractio\n'*(N//13)),
    same=lambda: said('a\n'*(N//2)),
    lines=lambda: said(*map(str, range(N//7))),
    one=lambda: said('a'*N),
    surrogates=lambda: said('\ud800'*N),
    controls=lambda: said('\x00\x1b'*(N//2)),
    wide=lambda: said('ß\u2028'*(N//2)),
    brackets=lambda: block('['*N),
    objects=lambda: block('{'*N),
    digits=lambda: block('{"answer": ' + '9'*N + '}'),
    names=lambda: block('{' + '"answer": 1,'*(N//12) + '"answer": 1}'),
    answers=lambda: '<think></think>' + '<answer>'*(N//8),
    escapes=lambda: block('{"answer": "' + '\\u0041'*(N//6) + '"}'),
)
REWARDS = dict(
    accuracy=lambda text: accuracy_reward(text, ['x'], 'decision'),
    format=format_reward,
    ehrmind=lambda text: ehrmind_reward(text, always, ('answer',)),
)


@pytest.mark.parametrize('name', COSTLY)
def test_ten_million_characters_cost_a_moment(name):
    text = COSTLY[name]()
    assert len(text) > 9_900_000
    for reward in REWARDS.values():
        start = time.process_time()
        earned = reward(text)
        seconds = time.process_time() - start
        assert earned in (-2, -1, 0, 1)
        assert seconds < 5  # one on a quiet machine; what grows with the square of the length takes hours


def test_importing_needs_no_model():
    code = """
import sys, ehr_r1.training.rewards
heavy = {'torch', 'transformers', 'trl', 'vllm', 'openai', 'datasets'} & set(sys.modules)
sys.exit(str(heavy) if heavy else 0)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
