"""Fixtures: a tiny model with its tokenizer, and prompts of four patients whose records begin alike."""
import random

import polars as pl
import pytest
import torch

from ehr_r1.data.tasks import TASKS
from ehr_r1.evaluation.answers import asks_of
from ehr_r1.training.examples import Writer
from ehr_r1.training.models import new_model, train_tokenizer

PATIENTS = [f'## Patient\n- anchor_age {age}, gender {gender}' for age in (41, 73) for gender in 'FM']
KINDS = (('Inpatient_Mortality', 'risk', ['yes']), ('labevents', 'decision', ['Sodium', 'Glucose']))


def event(i):
    "A laboratory event with two items."
    time = f'21{20 + i//12}-0{1 + i%9}-1{i%7} 0{i%8}:{10 + i}'
    rows = f'- Sodium {120 + i} mEq/L [133-145]\n- Glucose {70 + 3*i} mg/dL [70-100]'
    return f'\n\n## Labs [{time}]\n{rows}'


EVENTS = [event(i) for i in range(40)]


def user_words(rng, task):
    "A record of one of four patients, often with the window of another one, and the question."
    begin = rng.choice((0, 9, 20))
    n = rng.choice((1, 3, 4, 8))
    patient, window = rng.choice(PATIENTS), ''.join(EVENTS[begin:begin + n])
    return f'{patient}{window}\n{TASKS[task].instruction}'


@pytest.fixture(scope='module')
def samples():
    "Rows of EHR-Bench, risks and decisions in turn."
    rng, rows = random.Random(0), []
    for i in range(48):
        task, family, label = KINDS[i % 2]
        system = dict(role='system', content='You are a helpful assistant.')
        messages = [system, dict(role='user', content=user_words(rng, task))]
        about = dict(sample_id=f's{i:03d}', task=task, subject_id=i//4, family=family)
        rows.append(about | dict(label=label, messages=messages))
    return pl.DataFrame(rows)


@pytest.fixture(scope='module')
def tokenizer(samples):
    texts = [messages[1]['content'] for messages in samples['messages'].to_list()]
    words = ['yes', 'no', ' Yes', 'Sodium\nGlucose', 'You are a helpful assistant.']*200
    return train_tokenizer([*texts, *words], 512)


@pytest.fixture(scope='module')
def model(tokenizer):
    "Random weights, larger than usual, so that probabilities and words differ from prompt to prompt."
    torch.set_num_threads(1)
    made = new_model('tiny', tokenizer, 0, 1024, copies=False)
    with torch.no_grad():
        for weights in made.parameters():
            if weights.dim() > 1:
                weights.mul_(5)
        made.model.embed_tokens.weight[tokenizer.eos_token_id] *= 2.5  # so that some answers end
    return made


@pytest.fixture(scope='module')
def folder(model, tokenizer, tmp_path_factory):
    "The model's checkpoint."
    where = tmp_path_factory.mktemp('tiny')
    model.save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


@pytest.fixture(scope='module')
def writer(tokenizer):
    return Writer(tokenizer, 700, 24)


@pytest.fixture(scope='module')
def asks(samples, writer):
    return asks_of(samples, writer, 'think')


@pytest.fixture(scope='module')
def prompts(asks):
    return [ask.prompt for ask in asks]
