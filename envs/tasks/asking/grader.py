"""Grade of a reply to a question that may lack something: does it ask for what is missing, briefly, and nothing else?

The text of this file is the `source` of a python grader, which is one text: so it is one file. A row names its slots
in `missing` and `given`, and the `domain` they belong to. Of a reply that should ask, 0.1 is for asking one or two
questions, 0.1 for questions about slots, 0.8 for the right slots, all of it less for chatter. A reply to a question
that lacks nothing should answer. Questions are known by patterns of wording: what no pattern knows is not credited.
"""

import re
from typing import Any

MAX_CHARS = 1200  # a longer reply gets 0 before any pattern sees it
MAX_QUESTIONS = 2
FREE_WORDS = 12  # of courtesy and advice beside the questions
QUESTION_WORDS = 20  # that one question sentence may have
COST_PER_WORD = 0.02  # of every word beyond these
ANSWER_WORDS = (6, 60)
WRONG, OTHER = 1.5, 0.5  # weights of a question for what was said, and of one that is about no slot

_MEDICINE = (
    r"(?:medic(?:ines?|ations?|aments?)|meds|drugs?|tablets?|pills?|prescriptions?|pain ?killers?|supplements?"
    r"|vitamins?)\b"
)
# Wordings of a question for each slot, searched in one sentence, lower case, that asks the user.
HEALTH = {
    "duration": r"\bhow (?:long(?! (?:should|will|would|can|until|before|do i))|recent)|\bsince when|\bduration"
    r"|\blasted\b"
    r"|\bhow many (?:hours|days|nights|weeks|months|years)(?! old)|\b(?:what|which) (?:day|week|month)\b"
    r"|\bwhen (?:did|was|have|had|were)\b.{0,40}\b(?:star|beg[ai]|first|com|came|noti[cs]|appear|get|feel|occur|happen)"
    r"|\b(?:did|has|have)\b.{0,25}\b(?:start|beg[iu]n|come on|appear)\w*.{0,20}\b(?:recent|today|yesterday|long|sudden)"
    r"|\bwhen (?:it|this|that|they|you|(?:the|your|these) \w+)\b.{0,20}\b(?:star|beg[aiu]|first|came|noti[cs]|appear)"
    r"|\bhave you had (?:this|it|that|them)\b.{0,12}\b(?:long|while)"
    r"|\b(?:is|are) (?:this|it|these|they) (?:a )?(?:new|recent)",
    "severity": r"\bhow (?:bad|severe|strong|intense|serious|painful|uncomfortable|sore|itchy|troublesome|mild)"
    r"|\bhow much (?:pain|does|is|discomfort)|\bscale\b|\bseverity|\brate (?:the|your|it)"
    r"|\b(?:0|1|zero|one) to (?:10|ten)\b"
    r"|\b(?:is|are|would you (?:call|say)|do you find) (?:it|this|the pain|they|your \w+)\b.{0,25}"
    r"\b(?:mild|severe|bad|strong|unbearable|worse|painful)"
    r"|\bdoes (?:it|this|the pain) (?:keep|stop|wake|hurt|interfere|bother|affect)",
    "age": r"\bhow (?:many years )?old\b(?! (?:is|are) (?:it|this|the|they|your))|\byour (?:current |exact )?age\b"
    r"|\b(?:what|which) age\b|\byou born\b|\bdate of birth|\bbirth (?:year|date)|\bage (?:group|range)"
    r"|^(?:and )?age\W*$"
    r"|\bare you (?:over|under|above|below|older|younger|an adult|a child|a teen)"
    r"|\bthe age of the (?:patient|person)|\bwhat(?:'s| is) the age\b",
    "medicines": r"\b(?:tak(?:e|ing|en)|took|on|us(?:e|ed|ing)|prescribed?)\b(?: (?!in\b)\w+){0,4}? "
    + _MEDICINE
    + r"|\b(?:what|which|any|other|list|about|share)(?: (?:kind|type|sort)s? of)?(?: (?!in\b|the\b|to\b|of\b)\w+){0,2} "
    + _MEDICINE
    + r"|^(?:and )?"
    + _MEDICINE
    + r"|\b(?:are|do) you (?:currently |already |regularly |also )?(?:take|taking|on|using|use) (?:any|some)thing\b"
    r"|\bwhat (?:are you|do you|have you been) (?:currently |already |regularly )?(?:tak(?:e|ing)|on)\b"
    r"|\bon any treatment",
    "allergies": r"\ballerg(?:y|ies|ic reactions?)\W*$|\b(?:any|known|other|have|your|about|of)(?: \w+)? allergies\b"
    r"|\bany(?: \w+)? allergy\b|\bhistory of (?:\w+ )?allerg"
    r"|\ballergic to (?:any|anything|something|what|certain|medic\w+|drugs?|foods?)\b"
    r"|\b(?:what|anything|any|foods?|drugs?|something)\b.{0,30}\b(?:you(?:'re| are)|are you) allergic\b"
    r"|\breact(?:ed)? badly|\bbad reactions?\b|\bintoleran(?:t to|ces?)",
    "symptoms": r"\b(?:other|any|what|which|more|further|your|additional|else)\b.{0,20}\b(?:symptoms?|signs"
    r"|complaints)\b"
    r"|\banything else (?:wrong|bother|hurt|going on|you (?:feel|have noticed|notice)|unusual)|\bhow else do you feel"
    r"|\b(?:do you|have you|any|is there|are there|are you)\b.{0,30}\b(?:fever|temperature|nausea|swelling|swollen"
    r"|dizz\w+|rash|numb\w*|vomit\w*|chills|bleeding|discharge|redness|shortness of breath)\b",
}
_WORD = re.compile(r"\w+")
# "How long have you been an aspirin fan?" asks for nothing that was withheld: longer words must be the user's or these.
_OF_TIME = frozenset(
    _WORD.findall("""
about aches again already appear appeared approximately around aware began begin bother bothered bothering cause
coming complaint concern condition could dealing develop developed discomfort duration evening exactly experience
experienced experiencing feeling first following going happen happened happening having hours issue issues lasted
lasting lately might minutes months morning night nights notice noticed noticing occur occurred occurring onset
pains please present problem recent recently right roughly share since sorry specific start started starting
struggling sudden suddenly suffered suffering symptom symptoms thank thanks there these thing those today trouble
weeks where whether which while would years yesterday
""")
)
# Of somebody who runs tools: the first of these nouns after a question word is what is asked for.
CALLS = {
    "file": r"(?:file ?names?|files?|documents?|drafts?|reports?)",
    "place": r"(?:(?:sub)?folders?|(?:sub)?director(?:y|ies)|cit(?:y|ies)|airports?|locations?|destinations?"
    r"|places?|towns?|address(?:es)?|zip ?codes?|departure|arrival)",
    "symbol": r"(?:stocks?|compan(?:y|ies)|tickers?|symbols?|shares? of)",
    "amount": r"(?:amounts?|quantit(?:y|ies)|many|number of|shares|lit(?:er|re)s?|gallons?|miles|kilometers?|distance"
    r"|lines|much (?:fuel|gas\w*|petrol))",
    "price": r"(?:prices?|costs?|fees?|budget|limit|values?|much)",
    "token": r"(?:(?:access |authori[sz]ation )?tokens?|access codes?)",
    "password": r"(?:pass ?words?|pass ?phrase|credentials|log ?in details)",
    "user": r"(?:user ?names?|user ids?|accounts?|credentials|log ?in details)",
    "person": r"(?:mentions?|handles?|people|persons?|recipients?|receivers?|contacts?|someone)",
    "tags": r"(?:hash ?tags?|tags?)",
    "text": r"(?:contents?|texts?|messages?|comments?|wording|titles?|captions?|say|write|tweets?|body|posts?)",
    "date": r"(?:dates?|days?|months?)",
    "class": r"(?:(?:travel |cabin |seat |ticket |flight )?class(?:es)?|cabin)",
    "sector": r"(?:sectors?|industr(?:y|ies)|fields?|areas?)",
    "card": r"(?:(?:credit |payment )?cards?(?: ids?)?|payment method)",
    "ticket": r"(?:tickets?(?: ids?| numbers?)?)",
    "word": r"(?:(?:key|search )?words?|terms?|phrases?|patterns?)",
    "currency": r"(?:currenc(?:y|ies))",
    "passport": r"(?:passports?(?: numbers?)?)",
    "name": r"(?:(?:first|last|full|card ?holder(?:'s)?|your|whose|travell?er'?s?) names?|cardholder)",
}
# Question words that say what they ask for. "name of the file" asks for the file.
_BARE = {
    "place": r"\bwhere\b",
    "person": r"\bwho(?:m)?\b",
    "date": r"\bwhen (?:do|would|should|will|are|is)\b",
    "amount": r"\bhow (?:many|far)\b",
}
# (what asks, how many words may stand between it and the noun)
_LEADS = (
    (r"\b(?:which|what(?:'s)?(?! (?:kind|type|sort)s? of)|whose|how(?= (?:many|much|far)))\b", 5),
    (r"\b(?:provide|give|tell|specify|confirm|share|need|know|have|clarify|send)\b", 3),
)
_ASKING = [
    (
        re.compile(lead),
        {slot: re.compile(rf"(?:\W+[\w']+){{0,{gap}}}?\W+(?P<noun>{noun})\b") for slot, noun in CALLS.items()},
    )
    for lead, gap in _LEADS
]
_NAME_OF = re.compile(r"\bnames? (?:of|for)\b")
_SENTENCE_END = re.compile(r"(?<=[.?!])\s+|\n+")
_REQUEST = re.compile(
    r"\b(?:please|tell me|let me know|share|provide|need to know|specify|like to know|(?:could|can) you)\b"
)
_TO_ONESELF = re.compile(r"^(?!.*\byou).*\b(?:i|my|me|mine|myself)\b", re.DOTALL)  # "What should I do?"
_CLAUSE = re.compile(  # each is a question of its own, also in one sentence
    r"(?:^|[,;:]|\b(?:and|or)\b)\s*(?:and |or )?"
    r"(?:how|what|when|which|where|who|why|(?:do|did|are|have|were|can|will) you|is there|are there|does it)\b"
)
_NEXT_SPEAKER = re.compile(r"(?im)^[ \t*#>]{0,8}(?:user|patient|assistant|human|system)[ \t*]{0,8}:")
_NOT_TAKING = re.compile(
    r"^(?!.*\b(?:take|taking|taken|use|using|on)\b).*\ballergic\b.*|\ballerg\w+ (?:to|with) [^,?]{0,40}"
    r"|\b(?:consider|recommend|should|would (?:you )?like|suggest)\w* .{0,40}"
)
_IS_ALLERGY = re.compile(
    r"\b(?:is|be|was|it's) (?:it |this |that )?(?:an? |the |your )?allerg\w+|\ballergy test\w*|\ballergy to \w+"
    r"|\b(?:nature|kind|type|sort|cause) of (?:an? |your |the )?allerg\w+|\bhow (?:\w+ ){1,2}your allerg\w+"
    r"|\b(?!an\b|any\b|your\b|known\b|have\b|other\b|or\b|and\b|particular\b|food\b|drug\b|medicine\b)\w+ allergy\b"
)
_ADVICE = re.compile(
    r"(?:^|[.,;:!]|\b(?:you (?:can|should|could|might|may)|please|and|then|or|to|(?:recommend|suggest)(?: that)?"
    r"(?: you)?))\s*(?:rest|drink|try|avoid|apply|keep|use|wash|sleep|stretch|gargle|take|see|visit"
    r"|consult|talk to|raise|massage|put|eat|stay|wear|go to|call|done|moved?|here (?:is|are))\b"
)
_REFUSAL = re.compile(
    r"\b(?:cannot|can't|unable to|not able to|won't|sorry, but)\b.{0,40}\b(?:answer|help|assist|provide|advice|give)"
)


def grade(sample: dict[str, Any], item: dict[str, Any]) -> float:
    text = str(sample.get("output_text") or "")
    if not text.strip() or len(text) > MAX_CHARS:
        return 0.0
    domain, known = item.get("domain", "health"), words(prompt_of(item))
    is_whole = sample.get("stop_reason") != "max_tokens"
    text = _NEXT_SPEAKER.split(text)[0].lower().replace("\u2019", "'")
    sentences = [said for said in _SENTENCE_END.split(text) if not is_echo(said, known)]
    asked = [(said, slots) for said in sentences if (slots := slots_asked(said, domain, known)) is not None]
    num_asked = sum(max(len(slots), len(_CLAUSE.findall(said)), 1) for said, slots in asked)
    missing, given = set(item["missing"]), set(item["given"])
    if not missing:
        return answer_grade(sentences, num_asked) * (1.0 if is_whole else 0.5)
    if not 1 <= num_asked <= MAX_QUESTIONS:
        return 0.0
    found = set().union(*(slots for _, slots in asked))
    score = 0.1 + 0.1 * bool(found) + 0.8 * fit(found, num_asked, missing, given)
    return score * brevity(sentences, [said for said, _ in asked]) * (1.0 if is_whole else 0.5)


def slots_asked(sentence: str, domain: str, known: list[str]) -> set[str] | None:
    """The slots that a sentence asks the user for; None for one that asks nothing. `known`: the words of the prompt."""
    is_question = sentence.rstrip().endswith("?")
    if not is_question and not _REQUEST.search(sentence):
        return None
    if domain == "health":
        if is_question and _TO_ONESELF.search(sentence):
            return None
        cleared = {"medicines": _NOT_TAKING.sub(" ", sentence), "allergies": _IS_ALLERGY.sub(" ", sentence)}
        found = {slot for slot, wording in HEALTH.items() if re.search(wording, cleared.get(slot, sentence).strip())}
        if any(len(word) > 4 and word not in _OF_TIME and word not in known for word in words(sentence)):
            found -= {"duration"} if len(found) == 1 else set()
    else:
        found = nouns_asked(sentence)
    return found if found or is_question else None


def nouns_asked(sentence: str) -> set[str]:
    """The slots of CALLS whose noun comes first after a question word, or that a bare question word asks for."""
    sentence = _NAME_OF.sub("", sentence)
    found = set()
    for lead, noun_of in _ASKING:
        for start in (met.end() for met in lead.finditer(sentence)):
            nouns = {slot: near.span("noun") for slot, noun in noun_of.items() if (near := noun.match(sentence, start))}
            # of two that start at one place the longer
            first = min(((start, -end) for start, end in nouns.values()), default=None)
            found |= {slot for slot, (start, end) in nouns.items() if (start, -end) == first}
    return found or {slot for slot, wording in _BARE.items() if re.search(wording, sentence)}


def fit(found: set[str], num_asked: int, missing: set[str], given: set[str]) -> float:
    """F1 of what was asked for against what is missing; a question for what was said counts WRONG, any other OTHER."""
    hits, wrong = len(found & missing), len(found & given)
    other = num_asked - hits - wrong
    return 2 * hits / (len(missing) + hits + WRONG * wrong + OTHER * other)


def brevity(sentences: list[str], questions: list[str]) -> float:
    """1 for FREE_WORDS beside the questions and QUESTION_WORDS in each, then COST_PER_WORD less a word, down to 0."""
    beside = sum(len(said.split()) for said in sentences) - sum(len(said.split()) for said in questions)
    too_long = sum(max(0, len(said.split()) - QUESTION_WORDS) for said in questions)
    return max(0.0, 1.0 - COST_PER_WORD * (max(0, beside - FREE_WORDS) + too_long))


def answer_grade(sentences: list[str], num_asked: int) -> float:
    """Of a reply to a question that lacks nothing: 1 for an answer, half with one question after it, else 0."""
    text = " ".join(sentences)
    fewest, most = ANSWER_WORDS
    is_answer = fewest <= len(text.split()) <= most and bool(_ADVICE.search(text)) and not _REFUSAL.search(text)
    return (1.0 if num_asked == 0 else 0.5 if num_asked == 1 else 0.0) * is_answer


def is_echo(sentence: str, known: list[str]) -> bool:
    """Whether the user said this sentence."""
    said = words(sentence)
    return len(said) > 1 and f" {' '.join(said)} " in f" {' '.join(known)} "


def prompt_of(item: dict[str, Any]) -> str:
    """All that the user said."""
    return " ".join(str(said.get("content") or "") for said in item.get("messages", []) if said.get("role") == "user")


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower().replace("\u2019", "'"))
