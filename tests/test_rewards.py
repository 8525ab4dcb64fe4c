"""Rewards: won and lost as specified, the same as the benchmark's score, and calm before any text."""
import json, math, subprocess, sys, time
import pytest
from hypothesis import given, strategies as st
from ehr_r1.scoring import parse_answer, set_f1
from ehr_r1.synthesis import reasoning
from ehr_r1.inference.checkpoints import answer_text
from ehr_r1.training.rewards import (BRACKETS, LONGEST, SECTIONS, accuracy_reward, ehrmind_answer, ehrmind_reward, fault_of_format,
                                     format_reward, grpo_rewards)

CHAIN = '## Extraction\n**Labs [2130-04-02 08:00]**: Potassium 2.9\n## Reasoning\nIt is low.\n## Final Results\nPotassium'
TAGS = ['<think>', '</think>', '<answer>', '</answer>', *(f'\n## {s}\n' for s in SECTIONS), '##', '\n', '\r', ' ', 'yes', 'no', 'Potassium',
        '{"answer": 1}', '{', '[', '"', '\\', '1e999', 'NaN', '\x00', '\x1b', '\ud800', '\u2028', '\ufeff', 'ß', '\x85']
ANY = st.text(st.characters(codec=None)) | st.lists(st.sampled_from(TAGS) | st.text(max_size=3), max_size=30).map(''.join)
WORD = st.text(st.characters(categories=['Lu', 'Ll', 'Nd']), min_size=1, max_size=8)
LINES = st.lists(WORD, min_size=1, max_size=6, unique_by=str.casefold)

def said(*answer, chain=CHAIN): return answer_text(chain, answer)

# any text

@given(ANY, LINES)
def test_any_text_earns_an_allowed_reward(text, gold):
    assert 0 <= accuracy_reward(text, gold, 'decision') <= 1
    assert accuracy_reward(text, ['yes'], 'risk') in (0, 1)
    for sections in (True, False): assert format_reward(text, sections) == (-1 if fault_of_format(text, sections) else 1)
    seen = []
    earned = ehrmind_reward(text, lambda a: seen.append(a) or a['answer'] == 1, ('answer',))
    assert earned in (-2, 0, 1.1) and (earned == -2) == (not seen)

@given(st.lists(st.sampled_from(['{"answer": ', '"prediction": ', '}', '[', ']', ', ', '1', '-', '1e9', '1e999', 'NaN', 'null', 'true', '"a"', '"\\ud800"'])))
def test_any_json_is_read_or_refused(parts):
    answer = ehrmind_answer(f'<think>t</think><answer>{"".join(parts)}</answer>', ('answer',))
    if answer is None: return
    assert set(answer) == {'answer'} and json.dumps(answer, allow_nan=False, ensure_ascii=False).encode()

PIECES = ['<think>\n', *(p for s in SECTIONS for p in (f'## {s}\n', 'x\n')), '</think>\n', 'a\n', 'b\n']

@st.composite
def edited(draw):
    "A completion as taught, with up to three pieces dropped, doubled or moved."
    pieces = list(PIECES)
    for edit in draw(st.lists(st.sampled_from(['drop', 'double', 'move']), max_size=3)):
        at, to = draw(st.integers(0, len(pieces) - 1)), draw(st.integers(0, len(pieces) - 1))
        piece = pieces[at] if edit == 'double' else pieces.pop(at)
        if edit != 'drop': pieces.insert(to, piece)
    return pieces

@given(edited())
def test_the_format_is_met_by_exactly_what_it_asks_for(pieces):
    marks = [p for p in pieces if p[0] in '<#']
    answer = pieces[pieces.index('</think>\n') + 1:] if '</think>\n' in pieces else []
    asked = [p for p in PIECES if p[0] in '<#']
    met = marks[:len(asked)] == asked and pieces[0] == asked[0] and answer and len(set(answer)) == len(answer) and not any('think' in p for p in answer)
    assert (format_reward(''.join(pieces)) == 1) == bool(met)

def test_nothing_said():
    for text in ('', None, ' \n'):
        assert (accuracy_reward(text, ['no'], 'risk'), format_reward(text), ehrmind_reward(text, lambda a: True, ('answer',))) == (0, -1, -2)

# what the released code gets wrong: a format that nobody can pass, risk answers that always earn 0

@given(LINES, st.lists(st.text(st.characters(exclude_characters='<#\n', codec='utf-8')), min_size=3, max_size=3))
def test_whoever_does_as_taught_earns_both(gold, bodies):
    chain = '\n'.join(f'## {s}\n{b}' for s, b in zip(SECTIONS, bodies))
    assert fault_of_format(said(*gold, chain=chain)) == '' and accuracy_reward(said(*gold, chain=chain), gold, 'decision') == 1

@pytest.mark.parametrize('gold,other', [('yes', 'no'), ('no', 'yes')])
def test_a_risk_is_won_by_the_right_word_alone(gold, other):
    for right in (gold, gold.upper(), f' {gold.title()} '): assert accuracy_reward(said(right), [gold], 'risk') == 1
    for wrong in ([other], [gold, other], [gold, gold], [f'{gold}.'], [f'{gold} {other}'], [gold[0]], []): assert accuracy_reward(said(*wrong), [gold], 'risk') == 0
    assert accuracy_reward(gold, [gold], 'risk') == 0 == accuracy_reward(f'<think>{gold}', [gold], 'risk')

class Graph:
    "A thinking graph that found nothing."
    def best(self, n): return []

def test_a_chain_that_passes_the_filters_passes_the_format():
    record = '## Labs [2130-04-02 08:00]\n- Potassium 2.9 mmol/L\n- Sodium 138 mmol/L'
    case = reasoning.Case('a', 'labevents', record, ('Potassium', 'Magnesium'), Graph())
    events = reasoning.read_record(record, 'compact')
    chain = reasoning.verbalise(case, 'no_knowledge')
    assert reasoning.fault_of(chain, case.answers, events, 'no_knowledge') == ''
    for other in (chain, chain.replace('## ', '##'), chain.replace('## Reasoning', '##  Reasoning :'), chain.replace('\n', '\r\n')):
        assert list(reasoning.read_chain(other)) == list(SECTIONS) and fault_of_format(said(*case.answers, chain=other)) == ''
    plain = reasoning.verbalise(case, 'no_sections')
    assert fault_of_format(said(*case.answers, chain=plain)) == 'section missing' and format_reward(said(*case.answers, chain=plain), False) == 1

def test_sections_are_those_of_the_chains(): assert SECTIONS == reasoning.SECTIONS

# accuracy

@given(LINES, LINES, ANY)
def test_accuracy_is_the_score_of_the_benchmark(gold, answer, chain):
    text = said(*answer, chain=chain)
    lines = parse_answer(text).lines
    assert accuracy_reward(text, gold, 'decision') == (set_f1(gold, lines) if lines else 0)

def test_only_what_follows_the_last_block_counts():
    assert accuracy_reward('Potassium <think>Potassium</think>\nSodium', ['Potassium'], 'decision') == 0
    assert accuracy_reward('<think>a</think>\nSodium\n<think>b</think>\nPotassium', ['Potassium'], 'decision') == 1
    assert accuracy_reward('<think>a</think>\nPotassium\n<think>', ['Potassium'], 'decision') == 0
    assert accuracy_reward('the template opened it</think>\nPotassium', ['Potassium'], 'decision') == 1
    assert accuracy_reward('<think>a', [], 'decision') == accuracy_reward('<think>a</think>', [], 'decision') == 0

def test_a_label_that_cannot_be_met_is_an_error():
    for gold in ([], ['Yes'], ['1'], ['yes', 'no']):
        with pytest.raises(ValueError, match='yes'): accuracy_reward(said('yes'), gold, 'risk')
    with pytest.raises(ValueError, match='decision or risk'): accuracy_reward(said('yes'), ['yes'], 'Risk')

# format

A, B, C = (f'## {s}\nx\n' for s in SECTIONS)
@pytest.mark.parametrize('text,fault', [
    ('Potassium', 'no think block'), (f'{CHAIN}\n</think>\nPotassium', 'think block not opened'), ('a' + said('b'), 'text before the think block'),
    ('</think><think>', 'text before the think block'), (f'<think>\n{CHAIN}\nPotassium', 'think block not closed'),
    ('<think><think>', 'think block not closed'), (said('a', chain=f'<think>\n{CHAIN}\n</think>'), 'nested think block'),
    (said('a') + said('b'), 'more than one think block'), (said('a') + '<think>', 'more than one think block'), (said('a</think>b'), 'more than one think block'),
    (said('a', chain=A+B), 'section missing'), (said('a', chain=A+B+C+A), 'section repeated'), (said('a', chain=B+A+C), 'sections out of order'),
    (said(*(f'## {s}' for s in SECTIONS), chain='x'), 'section missing'), (said('a', chain=A+B+'### Final Results\n'), 'section missing'),
    (said('a', chain=A+B+'## final results\n'), 'section missing'), (said('a', chain=A+B+'so: ## Final Results\n'), 'section missing'),
    (f'<think>{A+B+C}</think>a', 'section missing'), (f'<think>\n{A+B}## Final Results</think>a', 'section missing'),
    (said(chain=A+B+C), 'empty answer'), (said(' \r\n\t', chain=A+B+C), 'empty answer'), (said('a', 'b', ' A '), 'repeated line'), (said('ß', 'SS'), 'repeated line'),
    (said('a', 'b'), ''), ('\n ' + said('a\r\nb\r\n'), ''), (said('## Extraction'), ''), (said('a', chain=A+'## Plan\n'+B+C), '')])
def test_the_fault_is_named(text, fault):
    assert fault_of_format(text) == fault and format_reward(text) == (-1 if fault else 1)
    if 'section' in fault: assert fault_of_format(text, sections=False) == ''

# as TRL calls them

def test_trl_gets_what_it_wants():
    accuracy, format = grpo_rewards()
    assert [accuracy.__name__, format.__name__] == ['accuracy', 'format']
    texts, label, family = [said('a', 'c'), said('no'), 'yes'], [['a', 'b'], ['no'], ['yes']], ['decision', 'risk', 'risk']
    rest = dict(prompts=['p']*3, completion_ids=[[1]]*3, trainer_state=None, log_extra=None, log_metric=None, label=label, family=family, task=['t']*3)
    for completions in (texts, [[dict(role='assistant', content=t)] for t in texts]):
        assert accuracy(completions=completions, **rest) == [.5, 1, 0] and format(completions=completions, **rest) == [1, 1, -1]
    assert accuracy(completions=[[dict(role='assistant', content=None)]], label=[['no']], family=['risk']) == [0]
    with pytest.raises(ValueError): accuracy(completions=texts, label=label[:2], family=family)

def test_a_chain_that_was_split_off_is_an_error():
    for f in grpo_rewards():
        with pytest.raises(ValueError, match='prompts as text'):
            f(completions=[[dict(role='assistant', content='no', reasoning_content=CHAIN)]], label=[['no']], family=['risk'])

# EHRMind

def mind(body, before='<think>t</think>\n', after='', keys=('prediction', 'idx'), judge=lambda a: a['prediction'] == 'Eligible'):
    return ehrmind_reward(f'{before}<answer>{body}</answer>{after}', judge, keys)

RIGHT = '{"idx": "NCT1", "prediction": "Eligible"}'

@pytest.mark.parametrize('earned,texts', [
    (1.1, [dict(), dict(before=' \n<think></think>'), dict(after=' \n'), dict(body=f'\n{RIGHT}\n')]),
    (0, [dict(body=RIGHT.replace('Eligible', 'Excluded')), dict(body='{"idx": 1, "prediction": true}'), dict(body='{"idx": -0.5e3, "prediction": ""}')]),
    (-2, [dict(before=''), dict(before='x<think>t</think>'), dict(before='<think>t</think>x'), dict(before='<think>t'), dict(before='t</think>'),
          dict(before='<think>t</think><think>t</think>'), dict(before='<think><think>t</think></think>'), dict(before='</think><think>'),
          dict(before='<think>t</think><answer>'), dict(before=f'<think><answer>{RIGHT}</answer></think>'), dict(after='.'), dict(after=f'<answer>{RIGHT}</answer>'),
          dict(after='<think>t</think>', before='')]),
    (-2, [dict(body=b) for b in ('', 'Eligible', 'null', f'[{RIGHT}]', '{"prediction": "Eligible"}', RIGHT[:-1] + ', "more": 1}', RIGHT[:-1], RIGHT + RIGHT,
                                 RIGHT.replace('"', "'"), '{"idx": 1, "idx": 1, "prediction": "Eligible"}', '{"idx": 1, "prediction": "Excluded", "prediction": "Eligible"}',
                                 '{"idx": 1, "prediction": ["Eligible"]}', '{"idx": {}, "prediction": "Eligible"}', '{"idx": null, "prediction": "Eligible"}',
                                 '{"idx": "\x00", "prediction": "Eligible"}', '{"idx": "\\udc00", "prediction": "Eligible"}', '{"idx": "\ud800", "prediction": "Eligible"}',
                                 f'{{"idx": "{"x"*LONGEST}", "prediction": "Eligible"}}', '\ufeff' + RIGHT)]),
    (-2, [dict(body=f'{{"idx": {n}, "prediction": "Eligible"}}') for n in ('NaN', 'Infinity', '-Infinity', '1e999', '-1e999', '9'*400, '-' + '9'*5000, '01', '+1', '.5', '0x1')])])
def test_ehrminds_three_rewards(earned, texts):
    assert [(mind(**dict(dict(body=RIGHT), **t)), t) for t in texts if mind(**dict(dict(body=RIGHT), **t)) != earned] == []

def test_an_answer_that_was_closed_before_it_began_is_malformed():
    for text in (f'<think></answer></think><answer>{RIGHT}', f'<think>t</think></answer>{RIGHT}<answer>', f'<think>t</think><answer>{RIGHT}'):
        assert ehrmind_reward(text, lambda a: True, ('prediction', 'idx')) == -2

@pytest.mark.parametrize('depth', [BRACKETS - 1, BRACKETS + 1, 4_000])
def test_deep_json_is_malformed(depth):
    for opening, closing in ('[]', ('{"a":', '}')):
        if depth*len(opening) < LONGEST: assert mind(f'{{"idx": {opening*depth}1{closing*depth}, "prediction": "Eligible"}}') == -2
        assert mind(opening*depth) == -2

@given(st.fixed_dictionaries({'answer': st.text(st.characters(codec='utf-8'), max_size=50).filter(lambda t: '<' not in t) | st.booleans()
                              | st.integers(-10**300, 10**300) | st.floats(allow_nan=False, allow_infinity=False)}))
def test_a_single_value_comes_back_as_it_was_written(answer):
    found = ehrmind_answer(f'<think>t</think><answer>{json.dumps(answer)}</answer>', ('answer',))
    if str(answer['answer']).count('[') + str(answer['answer']).count('{') < BRACKETS: assert found == answer and type(found['answer']) is type(answer['answer'])
    if isinstance(answer['answer'], int): assert math.isfinite(float(found['answer']))

def test_a_judge_that_fails_is_heard():
    with pytest.raises(KeyError): mind(RIGHT, judge=lambda a: a['answer'])

# cost

def block(body): return f'<think>t</think><answer>{body}</answer>'

COSTLY = dict( # texts of about n characters that cost much if read carelessly
    opening=lambda n: '<think>'*(n//7), closing=lambda n: '<think>' + '</think>'*(n//8), pairs=lambda n: '<think></think>'*(n//15),
    space=lambda n: ' '*n, newlines=lambda n: '<think>' + '\n'*n, before=lambda n: '\n'*n + said('a'),
    blanks=lambda n: said('a', chain='## Extraction' + ' '*n + 'x'), tabs=lambda n: said('a', chain='## Extraction' + '\t \r'*(n//3) + ':'),
    colons=lambda n: said('a', chain='## Extraction' + ' :'*(n//2)), hashes=lambda n: said('a', chain='##\n'*(n//3)),
    titles=lambda n: said('a', chain='## Extraction\n'*(n//14)), near=lambda n: said('a', chain='## Extractio\n'*(n//13)),
    same=lambda n: said('a\n'*(n//2)), lines=lambda n: said('\n'.join(map(str, range(n//7)))), one=lambda n: said('a'*n),
    surrogates=lambda n: said('\ud800'*n), controls=lambda n: said('\x00\x1b'*(n//2)), wide=lambda n: said('ß\u2028'*(n//2)),
    brackets=lambda n: block('['*n), objects=lambda n: block('{'*n), digits=lambda n: block('{"answer": ' + '9'*n + '}'),
    names=lambda n: block('{' + '"answer": 1,'*(n//12) + '"answer": 1}'), answers=lambda n: '<think></think>' + '<answer>'*(n//8),
    escapes=lambda n: block('{"answer": "' + '\\u0041'*(n//6) + '"}'))

@pytest.mark.parametrize('name', COSTLY)
def test_ten_million_characters_cost_a_moment(name):
    text = COSTLY[name](10_000_000)
    assert len(text) > 9_900_000
    for reward in (lambda: accuracy_reward(text, ['x'], 'decision'), lambda: format_reward(text), lambda: ehrmind_reward(text, lambda a: True, ('answer',))):
        start = time.process_time()
        assert reward() in (-2, -1, 0, 1)
        assert time.process_time() - start < 1.5

def test_importing_needs_no_model():
    heavy = "{'torch', 'transformers', 'trl', 'vllm', 'openai', 'datasets'}"
    code = f'import sys, ehr_r1.training.rewards; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).returncode == 0
