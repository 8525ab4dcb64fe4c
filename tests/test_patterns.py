"Every pattern of the library runs in linear time, whatever text it meets."
import ast
import importlib
import re
import signal
from contextlib import contextmanager
from pathlib import Path
from re import _constants as ops
from re import _parser as parser

import pytest

LIBRARY = Path(__file__).resolve().parent.parent/'ehr_r1'
CALLS = ('compile', 'search', 'match', 'fullmatch', 'findall', 'finditer', 'split', 'sub', 'subn')
SECONDS = .3      # for a text of `LONGEST` characters
LONGEST = 50_000  # a pattern of second degree takes seconds for it

# --- the patterns: those that modules hold, and those in calls of `re`
# patterns that functions make, by module and their source in a call of `re`: what they become, from the module's names
MADE = {
    ('synthesis.support', "f'[^\\\\W\\\\d_]{{{least},}}'"): lambda names: [r'[^\W\d_]{3,}', r'[^\W\d_]{5,}'],
    ('synthesis.support', "f'^## ({titles})(?: \\\\[([^\\\\]\\\\n]*)\\\\])?$'"):
        lambda names: [names['event_heading'](style).pattern for style in ('official', 'compact')],
    ('synthesis.support', "f'(?<!\\\\w){re.escape(item.strip())}(?!\\\\w)'"): lambda names: [r'(?<!\w)item(?!\w)'],
    ('synthesis.cases', 'f"({\'|\'.join(map(re.escape, longest_first))})"'): lambda names: ['(ab|a|b)'],
    ('transfer.medcalc.values', 'form'): lambda names: names['WEEK_FORMS'],
    ('transfer.mimic_cdm.baselines', 'DISEASE_SIGNS[disease]'): lambda names: names['DISEASE_SIGNS'].values(),
    ('transfer.mimic_cdm.benchmark', 'organ'): lambda names: names['_ORGANS'].values(),
}
# these read the texts of the synthetic hospital alone
OWN = ('hospital.', 'transfer.ehrshot.synthetic', 'transfer.mimic_cdm.synthetic')


def modules():
    "Names and files of the library's modules."
    for file in sorted(LIBRARY.rglob('*.py')):
        name = '.'.join(file.relative_to(LIBRARY).with_suffix('').parts)
        if file.name not in ('__init__.py', '_modidx.py') and not name.startswith(OWN):
            yield name, file


def is_call_of_re(node):
    owner = node.func.value if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
    return isinstance(owner, ast.Name) and owner.id == 're' and node.func.attr in CALLS and bool(node.args)


def flags_of(node, names):
    "The flags of a call of `re`."
    last = {'compile': 1, 'sub': 4, 'subn': 4, 'split': 3}.get(node.func.attr, 2)
    given = [word.value for word in node.keywords if word.arg == 'flags'] or node.args[last:last + 1]
    return value_of(given[0], names) if given else 0


def value_of(node, names):
    "What an expression made of constants and a module's names is worth; a NameError where it needs more."
    return eval(compile(ast.Expression(node), '', 'eval'), names)  # of our own source


def held(value):
    "The patterns in what a module holds."
    if isinstance(value, re.Pattern):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from held(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from held(part)


def patterns_of(name, file):
    "The compiled patterns of a module; a pattern that a function makes must be in `MADE`."
    module = importlib.import_module(f'ehr_r1.{name}')
    kept = [pattern for value in list(vars(module).values()) for pattern in held(value)]
    found = {(pattern.pattern, pattern.flags): pattern for pattern in kept}
    for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
        if not is_call_of_re(node):
            continue
        source = ast.unparse(node.args[0])
        try:
            made = [value_of(node.args[0], dict(vars(module)))]
        except NameError:
            assert (name, source) in MADE, f'{name}: what does {source} become? Say it in MADE.'
            made = MADE[name, source](vars(module))
        for pattern in [re.compile(text, flags_of(node, dict(vars(module)))) for text in made]:
            found[pattern.pattern, pattern.flags] = pattern
    return [pattern for pattern in found.values() if isinstance(pattern.pattern, str)]


PATTERNS = {(pattern.pattern, pattern.flags): (name, pattern) for name, file in modules()
            for pattern in patterns_of(name, file)}

# --- adversarial texts, from a pattern's own parts

USUAL = (' ', '\n', 'a', '0', '.', ',', '-', '*', '"', '\\', '|', '#', '[', '(', '<', 'é', '\t')


def letters(items):
    "A character or two of each class and literal in a parsed pattern."
    for op, value in items:
        if op is ops.LITERAL:
            yield chr(value)
        elif op is ops.NOT_LITERAL:
            yield 'a' if value != ord('a') else 'b'
        elif op is ops.IN:
            yield from in_class(value)
        elif op is ops.SUBPATTERN:
            yield from letters(value[3])
        elif op is ops.ATOMIC_GROUP:
            yield from letters(value)
        elif op is ops.BRANCH:
            for branch in value[1]:
                yield from letters(branch)
        elif op in (ops.MAX_REPEAT, ops.MIN_REPEAT, ops.POSSESSIVE_REPEAT):
            yield from letters(value[2])
        elif op in (ops.ASSERT, ops.ASSERT_NOT):
            yield from letters(value[1])


CATEGORY = {ops.CATEGORY_DIGIT: '0', ops.CATEGORY_SPACE: ' ', ops.CATEGORY_WORD: 'a', ops.CATEGORY_NOT_DIGIT: 'a',
            ops.CATEGORY_NOT_SPACE: 'a', ops.CATEGORY_NOT_WORD: '-'}


def in_class(members):
    negated = members[0][0] is ops.NEGATE
    if negated:
        allowed = re.compile('|'.join(map(re.escape, USUAL)))
        excluded = {c for op, value in members[1:] for c in ([chr(value)] if op is ops.LITERAL else [])}
        yield from [c for c in USUAL if allowed and c not in excluded][:3]
        return
    for op, value in members:
        if op is ops.LITERAL:
            yield chr(value)
        elif op is ops.RANGE:
            yield chr(value[0])
        elif op is ops.CATEGORY:
            yield CATEGORY[value]


def shortest(items):
    "A text that a parsed pattern may match, repeats as short as they go but once at least where that is short."
    text = ''
    for op, value in items:
        if op in (ops.MAX_REPEAT, ops.MIN_REPEAT, ops.POSSESSIVE_REPEAT):
            text += shortest(value[2])*min(max(value[0], 1), 5)
        elif op is ops.SUBPATTERN:
            text += shortest(value[3])
        elif op is ops.ATOMIC_GROUP:
            text += shortest(value)
        elif op is ops.BRANCH:
            text += shortest(value[1][0])
        elif op in (ops.LITERAL, ops.NOT_LITERAL, ops.IN):
            text += next(letters([(op, value)]), '')
        elif op is ops.ANY:
            text += 'a'
    return text


def places(items, before=''):
    "Where a pattern repeats: (a text that leads there, what is repeated)."
    for number, (op, value) in enumerate(items):
        lead = before + shortest(items[:number])
        if op in (ops.MAX_REPEAT, ops.MIN_REPEAT, ops.POSSESSIVE_REPEAT):
            if value[1] > 20:
                yield lead, value[2]
            yield from places(list(value[2]), lead)
        elif op is ops.SUBPATTERN:
            yield from places(list(value[3]), lead)
        elif op is ops.ATOMIC_GROUP:
            yield from places(list(value), lead)
        elif op is ops.BRANCH:
            for branch in value[1]:
                yield from places(list(branch), lead)


def adversarial(pattern):
    "(beginning, what is repeated, end) of texts that a pattern may find hard."
    items = list(parser.parse(pattern.pattern, pattern.flags))
    alphabet = list(dict.fromkeys([*letters(items), *USUAL[:4]]))[:24]
    leads = [('', list(dict.fromkeys([shortest(items), *alphabet, *USUAL])))]
    for lead, inside in places(items):
        pumps = dict.fromkeys([shortest(list(inside)), *letters(list(inside)), 'a'])
        leads.append((lead, list(pumps)))
        leads.append(('', [lead, lead + next(iter(pumps))]))
        leads.append(('', [lead[-1:] + pump for pump in list(pumps)[:3]]))
    leads.append(('', [first + second for first in alphabet[:8] for second in alphabet[:8]]))
    seen = {(lead, pump) for lead, pumps in leads for pump in pumps if pump}
    for lead, pump in sorted(seen):
        for end in ('', '\0', '\n!'):
            yield lead, pump, end


class TooSlow(Exception):
    pass


@contextmanager
def at_most(seconds):
    "Stop what takes longer; the engine of `re` lets signals through."
    def stop(*_):
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def slow_text(pattern):
    "The first text for which a pattern takes too long; '' if there is none."
    for lead, pump, end in adversarial(pattern):
        text = lead + pump*(LONGEST//len(pump)) + end
        for read in (pattern.fullmatch, lambda text: sum(1 for _ in pattern.finditer(text))):
            for _ in range(2):  # the machine may have been busy
                try:
                    with at_most(SECONDS):
                        read(text)
                    break
                except TooSlow:
                    continue
            else:
                return f'{lead!r} + {pump!r}*n + {end!r}'
    return ''


@pytest.mark.parametrize('key', list(PATTERNS), ids=lambda key: f'{PATTERNS[key][0]}: {key[0][:40]!r}')
def test_a_pattern_takes_linear_time(key):
    name, pattern = PATTERNS[key]
    assert slow_text(pattern) == '', f'{name}: {pattern.pattern}'


@pytest.mark.parametrize('text', [
    r'(a+)+b', r'^\s*(.+?)\s*$', r'\d+\.\d{4,}', r'\s*\|\s*', r'\*\*\s*(.+?)\s*(?:\[x\])?\s*\*\*\s*:?\s*(.*)$',
    r'"((?:[^"\\]|\\.)*)" EXACT', r'(?:\w|_)+x', r'<!--.*?-->',
])
def test_a_slow_pattern_is_found(text):
    assert slow_text(re.compile(text)) != ''


def test_patterns_are_found():
    assert len(PATTERNS) > 40
    assert any(name == 'synthesis.support' for name, _ in PATTERNS.values())
