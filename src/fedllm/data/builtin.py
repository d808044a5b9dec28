"""
Built-in data: invented customer messages to a parcel service, a library and a city utility.

The rows come from a small grammar, so a demo or a test needs no download. The same call gives
the same rows on every machine: all choices come from one seeded bit stream.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

SITES: tuple[str, ...] = ("north", "harbour", "hill")
DEFAULT_SIZES: dict[str, int] = {"train": 1800, "test": 600, "pretrain": 40_000}

MIN_WORDS = 5
MAX_WORDS = 25

_SITE_SHARE = (0.55, 0.30, 0.15)
_SEED = 20_240_917
_PART_SEED = {"train": 1, "test": 2, "pretrain": 3}
# A text belongs to a part by its checksum, so parts of any size never share a text.
_BUCKETS = 8
_PART_BUCKETS = {"test": (0,), "train": (1, 2), "pretrain": (3, 4, 5, 6, 7)}


class _Intent(NamedTuple):
    """
    One intent: its domain, how often each site sees it, its reply and its phrasings.

    In a phrasing ``(a|b)`` is a choice (nestable) and ``{item}`` a detail drawn once per row.
    Earlier phrasings are more frequent. A phrasing that stands under two intents is meant:
    some messages are ambiguous, as real ones are.
    """

    domain: str
    sites: tuple[int, int, int]
    reply: str
    phrasings: tuple[str, ...]


_DETAILS: dict[str, tuple[str, ...]] = {
    "item": (
        "kettle", "desk lamp", "rain coat", "coffee grinder", "running shoes", "garden hose",
        "phone case", "blue sweater", "board game", "water bottle", "wall clock", "yoga mat",
        "picture frame", "bike helmet", "toaster", "winter boots", "tea set", "office chair",
        "headphones", "backpack", "camera strap", "bread knife", "sleeping bag", "red scarf",
    ),
    "title": (
        "The Glass Orchard", "Salt and Thunder", "A Quiet Engine", "Letters to Maren",
        "The Ninth Lantern", "Winter at Sea", "Stone Bread", "The Paper Garden",
        "Songs of the Ferry", "Under Blue Hills", "The Clockmaker", "Seven Small Bridges",
        "Ashes and Honey", "The Last Tram", "A House of Rain", "Northern Birds",
        "The Silver Well", "Dust on the Map", "The Owl Keeper", "Green Harvest",
        "The Long Corridor", "Amber Days", "Two Rivers", "The Empty Stage",
    ),
    "street": (
        "Mill Lane", "Oak Street", "Station Road", "Church Hill", "Baker Row", "Elm Avenue",
        "Harbour Street", "Castle Road", "Park Lane", "River Walk", "King Street", "Rose Court",
        "Market Square", "Bridge Road", "Garden Close", "Tower Street", "Field Lane", "Canal Row",
        "School Road", "Sunny Bank", "Quarry Road", "Chapel Street", "Orchard Way", "Pine Court",
    ),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
}  # fmt: skip

_SPECS: dict[str, _Intent] = {
    "parcel_late": _Intent(
        "parcel",
        (6, 3, 0),
        "We are sorry for the delay, the {item} should reach you within two days.",
        (
            "(my|the) (parcel|package|order) with the {item} (should have|was supposed to have)"
            " (arrived|come|been here) (on {day}|days ago|last week) and (it is still not here|I"
            " am still waiting|nothing has come yet)",
            "(when will|when does) the {item} (finally |)(arrive|get here|reach me), the"
            " (delivery|courier) (was promised|was due) (for {day}|earlier this week)",
            "the (delivery|parcel) of the {item} is (several|three|four) days (behind"
            " schedule|behind the promised date|overdue) (but tracking still moves|but it is still"
            " on its way|)",
            "tracking (says|shows) the {item} is (still in transit|still on its way|at the depot),"
            " (why does it take so long|it is taking far too long)",
            "I (ordered|paid for express for) the {item} and the (van|courier) is (slower than"
            " promised|running days behind)",
            "(still no sign of|where is) the {item} that you (sent|shipped) (to me|last week)",
        ),
    ),
    "parcel_lost": _Intent(
        "parcel",
        (6, 0, 2),
        "We are opening a search for the {item} and will refund you if it is not found.",
        (
            "(tracking|the tracking page) (has not moved|has been stuck|shows nothing) for (three"
            " weeks|a month), I (think|fear|believe) the {item} (is gone|has vanished|went"
            " missing)",
            "(I am sure|it seems) (you have|the courier has) (lost|misplaced) (my|the)"
            " (parcel|package) with the {item} (somewhere|on the way|)",
            "the depot (says|told me) (nobody can find|they cannot find|they have no trace of) the"
            " {item} (any more|) (and I want a search|)",
            "(please trace|please search for|start a search for) the (parcel|package) with the"
            " {item}, it (disappeared|vanished) (after leaving|between) the (depot|sorting centre)",
            "the {item} (never turned up|never came) (after a month|after five weeks) and the"
            " (sender|shop) (asks for an investigation|says it is untraceable)",
            "(still no sign of|where is) the {item} that you (sent|shipped) (to me|last week)",
        ),
    ),
    "parcel_marked_delivered": _Intent(
        "parcel",
        (5, 0, 0),
        "We will ask the driver where the {item} was left and tell you today.",
        (
            "(tracking|the app|your page) (says|claims) the {item} was (delivered|handed over) (on"
            " {day}|today|) but (there is nothing here|I never received it|nothing is at my door)",
            "(the driver|someone) (signed|ticked it off) for the {item} (in my name|)"
            " (although|and) (nobody was home|none of the neighbours has it)",
            "I got a (message|mail) that the {item} (was left|had been dropped) at my (door|porch)"
            " but it (is not there|was not there)",
            "(delivery|the parcel) (is confirmed|is marked complete) for the {item}, (still|yet) I"
            " do not have it (and the neighbours do not either|)",
            "the {item} (never turned up|never came) (even though|although) the status (is"
            " delivered|says done)",
        ),
    ),
    "parcel_damaged": _Intent(
        "parcel",
        (6, 2, 0),
        "Please send a photo of the {item} and we will replace it.",
        (
            "the (box|parcel|package) (arrived|came) (crushed|torn open|wet) and the {item}"
            " (inside |)is (broken|in pieces|ruined)",
            "(my|the) {item} (was broken|had a big crack|was bent) when I (opened|unpacked) the"
            " (box|parcel)",
            "the courier (dropped|threw) the (box|package) and now the {item} (does not work|is"
            " scratched|is dented)",
            "(I unpacked|I just opened) the {item} and (one side|a part) is"
            " (smashed|cracked|dented)",
            "I (want|would like) (compensation|a replacement) because the {item} (came in bad"
            " shape|did not survive the trip)",
            "I am not (happy|satisfied) with the {item} and want my money back",
        ),
    ),
    "parcel_return": _Intent(
        "parcel",
        (4, 4, 0),
        "You can send the {item} back with the return label that we have mailed to you.",
        (
            "I (want|would like|need) to (send back|return) the {item} (because|since) it (does"
            " not fit|is the wrong size|is not what I expected)",
            "(how do I|how can I|where can I) (send|give) (back|return) the {item} (to the"
            " shop|for a refund|)",
            "(please send me|I need|can you print) a return label for the {item}",
            "the {item} is (fine|in good order) but I (changed my mind|no longer need it) and want"
            " to (give it back|hand it in)",
            "(which shop|which counter) (takes|accepts) the {item} if I (do not want|do not keep)"
            " it",
            "I am not (happy|satisfied) with the {item} and want my money back",
        ),
    ),
    "parcel_wrong_address": _Intent(
        "parcel",
        (5, 0, 3),
        "We have stopped the {item}, please confirm the correct address.",
        (
            "I (typed|gave|entered) the wrong (house number|street|address) for the {item}, (can"
            " you correct it|please change it)",
            "the (label|parcel) with the {item} (shows|has|goes to) my (old|former|previous)"
            " (address|flat|house)",
            "(I moved|we moved) last (week|month) and the {item} is (on its way|going) to the (old"
            " place|old flat)",
            "(please redirect|can you send) the {item} to (another|a different) (address|house)",
            "the {item} (went|was brought) to (somebody else|the wrong house) because the (street"
            " name|postcode) is (wrong|incorrect)",
            "(the driver|the courier) could not (find|reach) me with the {item}, what now",
        ),
    ),
    "parcel_reschedule": _Intent(
        "parcel",
        (5, 0, 1),
        "We will bring the {item} on the next working day instead.",
        (
            "(I will not be|nobody will be|I am not) (home|at home|in) on {day}, can (you|the"
            " driver) bring the {item} (another day|later)",
            "(please|could you) (deliver|bring) the {item} (on {day} instead|in the evening|after"
            " six)",
            "I (need|want) to (move|change|shift) the delivery (day|slot|time) of the {item} (to"
            " {day}|)",
            "I (missed|was out for) the (courier|driver) on {day}, (please try again|please come"
            " again) with the {item}",
            "(is it possible|would it be possible) to (hold|keep) the {item} (until|till) {day}"
            " (when I am back|)",
            "(the driver|the courier) could not (find|reach) me with the {item}, what now",
        ),
    ),
    "parcel_customs_fee": _Intent(
        "parcel",
        (4, 1, 0),
        "The charge for the {item} is the import tax, you can pay it online.",
        (
            "(why must I|why do I have to|do I really) pay (customs|import tax|a duty) (for|on)"
            " the {item}",
            "(the courier|a letter) asks for an (extra|import) (charge|fee) before I (get|receive)"
            " the {item}",
            "the {item} is (held|stuck) at (customs|the border), (what do I owe|how do I pay)",
            "(how much|what) is the (duty|import tax|handling fee) on the {item} from abroad",
            "I (was charged|had to pay) (more|extra) (at the door|on delivery) for the {item}, (is"
            " that right|what is that for)",
        ),
    ),
    "loan_renew": _Intent(
        "library",
        (0, 6, 0),
        "Your loan of {title} is extended by three weeks.",
        (
            "(can I|may I|could I) (keep|have|hold on to) {title} (for another week|one more"
            " week|two more weeks) (please|)",
            "(please renew|please extend|I want to renew|I would like to prolong) (my loan of"
            " |){title}",
            "I have not finished {title} (yet|) and it (is due|should be back) on {day}, (more"
            " time please|can I get longer)",
            "the (renew|extend) button for {title} (does nothing|is grey), (please do it for"
            " me|can you push the date)",
            "{title} (must go back|is due) (on {day}|soon) but I (am away|am ill), what can I do",
        ),
    ),
    "overdue_fine": _Intent(
        "library",
        (1, 5, 0),
        "The fine for {title} is one coin per day, you can pay it at the desk.",
        (
            "(why do I have|why is there) a (fine|late fee|penalty) (for|on) {title}",
            "I (brought back|returned) {title} (two days|a week) (late|after the date), (how much"
            " do I owe|what must I pay)",
            "(my account|the account) shows (a charge|money owed) because {title} was"
            " (late|overdue)",
            "(how do I|where can I) pay the (fine|late fee|penalty) for {title}",
            "(could you cancel|please waive) the (fee|fine) for {title}, I was (ill|in hospital)"
            " (on the due date|)",
            "your (reminder|letter) about {title} (says|claims) I owe money, (is that right|please"
            " check)",
        ),
    ),
    "return_not_recorded": _Intent(
        "library",
        (0, 5, 0),
        "We have found {title} on the shelf and cleared it from your account.",
        (
            "I (returned|brought back|dropped off) {title} (last week|on {day}) but it (still"
            " shows|is still listed) (as borrowed|on my account|as a loan)",
            "(the return box|the machine) (took|swallowed) {title} (but|and) (no receipt"
            " came|nothing was booked)",
            "(my account|the website) (says|thinks) I still have {title} (although|but) I gave it"
            " back (on {day}|)",
            "{title} is (on your shelf|back in the library), (please take it off|please remove it"
            " from) my (list|loans)",
            "your (reminder|letter) about {title} is (wrong|a mistake), (it is back|I do not have"
            " it)",
            "your (reminder|letter) about {title} (says|claims) I owe money, (is that right|please"
            " check)",
        ),
    ),
    "book_reserve": _Intent(
        "library",
        (3, 5, 0),
        "We have put {title} aside for you and will write when it is ready.",
        (
            "(can you|could you|please) (reserve|hold|put aside) {title} for me",
            "(all copies of|every copy of) {title} (are|is) (out|on loan), (put me on the list|can"
            " I join the queue)",
            "I (want|would like) to (borrow|be next for) {title} when it (comes back|is available)",
            "(how long is|where am I in) the waiting list for {title}",
            "(is|when is) {title} (free|available) (to pick up|for me) (yet|by {day})",
            "I (want|would like) to read {title} on my (holiday|trip), how do I get it",
        ),
    ),
    "book_damaged": _Intent(
        "library",
        (0, 4, 1),
        "Please bring {title} to the desk and we will see if it can be repaired.",
        (
            "(my dog|my child|my cat) (chewed|tore|drew in) {title}, (what now|do I have to"
            " replace it)",
            "I (spilled|dropped) (coffee|tea|water) on {title} and the pages are (wet|stained)",
            "(some pages of|the cover of) {title} (are missing|came off|is torn) (and it was like"
            " that before|)",
            "the (binding|back) of {title} (broke|fell apart) (while I was reading|)",
            "I (found|noticed) (stains|loose pages|writing) in {title} (when I came home|)",
            "what do I (owe|pay) for {title}, it (got ruined|is not in a good state)",
        ),
    ),
    "card_lost": _Intent(
        "library",
        (4, 3, 0),
        "We have blocked the old card, a new one waits for you from {day}.",
        (
            "I (lost|cannot find|misplaced) my (library card|card|member card) on {day}, (I need a"
            " new one|please block it)",
            "my (bag|wallet) was stolen on {day} with the (library|member) card (in it|inside)",
            "(can I pick up|how do I get) a (replacement|new) (card|library card) on {day}",
            "(please block|please lock) my (card|membership), it has been gone since {day}",
            "I was at the (counter|desk) on {day} and (forgot|left) my card (somewhere|there)",
            "I (cannot|could not) (log in|borrow anything) since {day}",
        ),
    ),
    "ebook_access": _Intent(
        "library",
        (0, 3, 2),
        "Please sign in again in the app, then {title} will open.",
        (
            "I (cannot|can not) (open|download|read) {title} (on my tablet|in the app|on my phone)",
            "the (digital|electronic|audio) (copy|version|edition) of {title} (stops|shows an"
            " error|stays blank)",
            "the app (says|claims) my licence for {title} (has ended|is not valid)",
            "(how do I|where can I) get {title} (as an ebook|as an audio book|on my reader)",
            "{title} (disappeared from|is gone from) my (app|reader|tablet)",
            "I (want|would like) to read {title} on my (holiday|trip), how do I get it",
        ),
    ),
    "room_booking": _Intent(
        "library",
        (0, 5, 0),
        "The study room is booked for you on {day}.",
        (
            "(can I|could we|may I) (book|reserve|have) (a|the) (study|group|quiet) room (on|for)"
            " {day}",
            "(is (a|the) (room|table) free|will (a|the) (meeting room|table) be available) on"
            " {day} for (four|six) people",
            "our (reading circle|club|class) needs a (place|room|space) on {day}",
            "(please hold|please keep) the (big|small) (room|table) for us on {day}",
            "I (want|need) to (move|change|cancel) my room (slot|booking) on {day}",
        ),
    ),
    "power_outage": _Intent(
        "utility",
        (2, 0, 5),
        "Our crew is working on the power in {street}, it should be back in two hours.",
        (
            "(there is no|we have no) (power|electricity|current) in {street} (since|from)"
            " (noon|this morning|last night)",
            "(the lights|all the lights) (went out|are off) (in|at our house in) {street} (and the"
            " fridge too|and nothing works|)",
            "(when will|when does) the (power|electricity) come back in {street}",
            "(a blackout|another power cut) in {street}, (the whole block|every house) is dark",
            "the fuse is (fine|in order) but our flat in {street} is (dark|without current)",
            "it is (completely dark|pitch dark) in {street} (tonight|this evening), please send"
            " someone",
        ),
    ),
    "street_light": _Intent(
        "utility",
        (2, 0, 4),
        "We will repair the street light in {street} this week.",
        (
            "(the lamp|the street light|a lamp post) (in|on|outside our house in) {street} (is"
            " broken|flickers|does not work)",
            "(two|several|three) street (lamps|lights) are (out|off) (along|on) {street}",
            "(the pavement|the crossing) in {street} is (unlit|not lit) (at night|after six)",
            "the (light|lamp) (outside|near) our house in {street} (stays on all day|goes on and"
            " off)",
            "(a car|a van) hit the (pole|lamp post) in {street} and (the bulb|the glass) is gone",
            "it is (completely dark|pitch dark) in {street} (tonight|this evening), please send"
            " someone",
        ),
    ),
    "water_leak": _Intent(
        "utility",
        (3, 0, 5),
        "Please close the main tap, a plumber is on the way to {street}.",
        (
            "(water is|there is water) (running|dripping|coming) (out of|from) (the wall|a"
            " pipe|the ground) (in|at) {street}",
            "(a pipe|the main) (burst|broke|is leaking) (in|under|near) {street}",
            "(the cellar|our basement) in {street} is (flooding|full of water|under water)",
            "(I see|we noticed) a (big|growing) puddle (in|on) {street} (and it has not rained|)",
            "the (tap|valve) near the meter in {street} (drips|will not close)",
            "we (use|lose) (much more|far more) water than before in {street}, please check",
        ),
    ),
    "bill_too_high": _Intent(
        "utility",
        (4, 2, 3),
        "We will check the bill for {street} and write to you within a week.",
        (
            "(my|the|our) (bill|invoice) for {street} is (twice as high|much higher|far more)"
            " (than usual|than last year|)",
            "(why is|why has) (my|the) (bill|invoice) for {street} (gone up|so high|doubled)",
            "(you charged|I was charged) (too much|double|for two homes) (for|at) {street}",
            "the (amount|sum|total) for {street} (cannot be right|must be a mistake)",
            "we (use|lose) (much more|far more) water than before in {street}, please check",
            "I (cannot believe|do not accept) what I should pay for {street} (this month|this"
            " time)",
        ),
    ),
    "payment_plan": _Intent(
        "utility",
        (3, 1, 2),
        "You can pay the bill for {street} in six parts.",
        (
            "(can I|could I|may I) pay the (bill|invoice) for {street} in (parts|instalments|small"
            " sums)",
            "I (cannot|am not able to) (afford|pay) the (bill|invoice) for {street} (this month|at"
            " once|before {day})",
            "(I lost my job|money is tight), (please give me|I need) more time for the"
            " (bill|invoice) for {street}",
            "(is there|do you offer) a (monthly|payment) plan for (a home|a flat) in {street}",
            "I (owe|still owe) you for {street} and would like to (spread|split) it",
            "I (cannot believe|do not accept) what I should pay for {street} (this month|this"
            " time)",
        ),
    ),
    "meter_reading": _Intent(
        "utility",
        (1, 3, 2),
        "Thank you, we have noted the reading for {street}.",
        (
            "(here is|I want to send|I would like to give you) the (meter reading|reading|number"
            " on the meter) for {street}",
            "(how do I|where can I) (send|enter|report) the (reading|numbers|meter value) for"
            " {street}",
            "(nobody came|your man did not come) to read the meter in {street} (on {day}|)",
            "(the bill|the invoice) for {street} (uses|is based on) an (estimate|old value), here"
            " is the (true|current) (number|count)",
            "the (display|counter) in {street} is (blank|hard to read), what should I (send|write)",
        ),
    ),
    "move_in": _Intent(
        "utility",
        (2, 0, 4),
        "Your contract for {street} starts on the day that you get the keys.",
        (
            "I (am moving|move) (into|to) (a flat|a house) in {street} (on {day}|next month) and"
            " need (power|water|a contract)",
            "(please start|please open|I want to open) a (contract|new account) for {street}",
            "(we just got|I just got) the keys (for|to) {street}, (how do I sign up|what do you"
            " need from me)",
            "(please register|please sign up) (me|us) as the new (tenant|owner) in {street}",
            "(please switch on|please connect) the (water|power) in {street}, we (arrive|begin) on"
            " {day}",
            "(our|my) move is on {day}, please change the name for {street}",
        ),
    ),
    "move_out": _Intent(
        "utility",
        (0, 1, 4),
        "We will close the contract for {street} and send the final bill.",
        (
            "I (am leaving|leave|am moving out of) (my flat|the house) in {street} (on {day}|next"
            " month) and (want to end|must cancel) (the contract|my contract)",
            "(please close|please end|I want to cancel) (my|our) (contract|account) for {street}",
            "(we sold|I gave up) (the house|the flat) in {street}, (send the last bill|please stop"
            " the contract)",
            "(somebody else|a new tenant) takes over (my|our) flat in {street}, (take me"
            " off|remove my name)",
            "(please switch off|please stop) the (water|power) in {street}, we (leave|go) on {day}",
            "(our|my) move is on {day}, please change the name for {street}",
        ),
    ),
}

INTENTS: tuple[str, ...] = tuple(_SPECS)

_OPENERS = (
    "hello,", "hi,", "good morning,", "good evening,", "dear team,", "excuse me,",
    "sorry to bother you,", "hi there,", "quick question:", "me again:",
    "hello, my name is (Ada|Tom|Lena|Omar|Rosa|Finn).",
    "I write for my (mother|father|neighbour|sister).", "this is (urgent|not urgent).",
)  # fmt: skip

_CLOSERS = (
    "thanks", "thank you", "many thanks", "please (answer|reply) soon", "what can I do",
    "can you help", "please help", "I hope you can help", "kind regards",
    "please call me", "thanks in advance",
)  # fmt: skip

# Clauses that speak of other matters of the same domain, to defeat a look-up of single words.
_ASIDES: dict[str, tuple[str, ...]] = {
    "parcel": (
        "the address on the label is (right|correct)",
        "(last time|last year) a parcel got lost",
        "the other parcel arrived (on time|undamaged)",
        "I do not want to return it",
        "my neighbour had to pay customs once",
        "the box itself (was|looked) fine",
        "I was (at home|in) all day",
        "I will be away next week",
        "I already (called|asked) the courier twice",
        "the driver was (friendly|rude)",
        "the tracking page is (slow|hard to read)",
        "it is a present for my (son|friend)",
        "I paid for express delivery",
        "the shop says to ask you",
        "I already sent one thing back",
    ),
    "library": (
        "I (already paid|never had) a fine",
        "I have my card with me",
        "my other books are back",
        "the book is in good condition",
        "I renewed it once before",
        "I asked for it at the desk",
        "the room was (cold|full)",
        "the app (works fine|was down yesterday)",
        "I return things on time (normally|always)",
        "my friend reserved it too",
        "my daughter reads it as an ebook",
        "I come to the library (often|every week)",
        "it is for my (course|reading circle)",
        "a reminder came by mail",
        "the card is still valid",
    ),
    "utility": (
        "the last bill was fine",
        "I paid (the bill|everything) on time",
        "the meter looks normal",
        "we moved in (two years ago|in spring)",
        "the neighbours have (water|power)",
        "there was a power cut last month",
        "the street lights work",
        "the (basement|cellar) is dry",
        "I am not moving out",
        "I sent the reading (in May|last week)",
        "a crew was here (before|last year)",
        "I have been a customer for years",
        "my contract number is on file",
        "I called (twice|on the phone) already",
        "the house is (old|new)",
    ),
}

# What the base model's training texts are answered with. They show the form of an answer and the
# repeated detail, but not the intents' answers: those are left for fine-tuning to teach.
_ACKNOWLEDGEMENTS: dict[str, tuple[str, ...]] = {
    "item": (
        "Thank you, we have passed your message about the {item} to the parcel desk.",
        "The parcel team will look into the {item} and write to you.",
    ),
    "title": (
        "Thank you, we have passed your message about {title} to the library desk.",
        "The library team will look into {title} and write to you.",
    ),
    "street": (
        "Thank you, we have passed your message about {street} to the utility desk.",
        "The utility team will look into {street} and write to you.",
    ),
    "day": (
        "Thank you, we have passed your message about {day} to the library desk.",
        "The library team will look into {day} and write to you.",
    ),
}

_OPENER_RATE = 0.3
_ASIDE_RATE = 0.55
_CLOSER_RATE = 0.25
_PLAIN_RATE = 0.3
_TYPO_RATE = 0.3


class _Draw:
    """
    Choices from one seeded stream of uniform numbers.

    Only ``Generator.random`` is used: derived samplers may change between numpy releases.
    """

    def __init__(self, *key: int) -> None:
        self._rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
        self._pending: list[float] = []

    def uniform(self) -> float:
        if not self._pending:
            self._pending = self._rng.random(4096).tolist()
        return self._pending.pop()

    def below(self, bound: int) -> int:
        return int(self.uniform() * bound)

    def pick(self, options: Sequence[str]) -> str:
        return options[self.below(len(options))]

    def weighted(self, weights: Sequence[float]) -> int:
        rest = self.uniform() * sum(weights)
        for index, weight in enumerate(weights):
            rest -= weight
            if rest < 0:
                return index
        return max(index for index, weight in enumerate(weights) if weight > 0)

    def shuffled(self, count: int) -> list[int]:
        order = list(range(count))
        for last in range(count - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order


def _expand(template: str, draw: _Draw) -> str:
    """Resolve every ``(a|b)`` of a template, innermost first."""
    while (end := template.find(")")) >= 0:
        start = template.rfind("(", 0, end)
        choice = draw.pick(template[start + 1 : end].split("|"))
        template = template[:start] + choice + template[end + 1 :]
    return " ".join(template.split())


def _misspell(text: str, draw: _Draw) -> str:
    """Drop, double or swap letters inside one plain word."""
    words = text.split(" ")
    # Slots stay intact, as the reply repeats them.
    spots = [i for i, word in enumerate(words) if word.isalpha() and len(word) >= 4]
    if not spots:
        return text
    spot = spots[draw.below(len(spots))]
    word = words[spot]
    at = 1 + draw.below(len(word) - 2)
    kind = draw.below(3)
    if kind == 0:
        word = word[:at] + word[at + 1 :]
    elif kind == 1:
        word = word[:at] + word[at] + word[at:]
    else:
        word = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    words[spot] = word
    return " ".join(words)


def _message(intent: str, draw: _Draw) -> str:
    """A message of an intent, its details still as slots."""
    spec = _SPECS[intent]
    weights = [1.0 / (rank + 2) for rank in range(len(spec.phrasings))]
    core = _expand(spec.phrasings[draw.weighted(weights)], draw)
    clauses = [core]
    if draw.uniform() < _ASIDE_RATE:
        aside = _expand(draw.pick(_ASIDES[spec.domain]), draw)
        clauses.insert(draw.below(2), aside)
    joint = draw.pick((". ", ", ", " and ", " - ") if clauses[0] is core else (". ", ", ", " but "))
    text = joint.join(clauses)
    if draw.uniform() < _OPENER_RATE:
        text = f"{_expand(draw.pick(_OPENERS), draw)} {text}"
    if draw.uniform() < _CLOSER_RATE:
        text = f"{text}, {_expand(draw.pick(_CLOSERS), draw)}"
    if draw.uniform() < _TYPO_RATE:
        text = _misspell(text, draw)
        if draw.uniform() < _TYPO_RATE:
            text = _misspell(text, draw)
    if draw.uniform() < _PLAIN_RATE:
        return text.lower()
    return text[:1].upper() + text[1:] + draw.pick((".", ".", "!", ""))


def _fill(template: str, details: dict[str, str]) -> str:
    for name, value in details.items():
        template = template.replace("{" + name + "}", value)
    return template


def _reply(intent: str, part: str, draw: _Draw) -> str:
    reply = _SPECS[intent].reply
    if part != "pretrain":
        return reply
    slot = next(name for name in _DETAILS if "{" + name + "}" in reply)
    return draw.pick(_ACKNOWLEDGEMENTS[slot])


def _labels(part: str, draw: _Draw) -> Iterator[tuple[str, str]]:
    """The endless (intent, site) pairs of a part."""
    while True:
        if part == "train":
            site = draw.weighted(_SITE_SHARE)
            intent = draw.weighted([spec.sites[site] for spec in _SPECS.values()])
            yield INTENTS[intent], SITES[site]
        else:
            # Whole rounds over the intents keep the part balanced at any size.
            for intent in draw.shuffled(len(INTENTS)):
                yield INTENTS[intent], draw.pick(SITES)


def rows(part: str, size: int | None = None) -> list[dict[str, str]]:
    """
    The rows of a part, each with the columns ``text``, ``intent``, ``site`` and ``reply``.

    ``part`` is "train" (three uneven sites with different intents), "test" (balanced intents) or
    "pretrain" (the texts of the built-in base model). No text occurs in two parts, or twice in
    one. A smaller ``size`` gives the first rows of a larger one.
    """
    if part not in DEFAULT_SIZES:
        raise ValueError(f"unknown part {part!r}: expected one of {', '.join(DEFAULT_SIZES)}")
    if size is None:
        size = DEFAULT_SIZES[part]
    if size < 0:
        raise ValueError(f"size must not be negative, got {size}")
    return [dict(row) for row in _rows(part, size)]


@lru_cache(4)
def _rows(part: str, size: int) -> tuple[dict[str, str], ...]:
    draw = _Draw(_SEED, _PART_SEED[part])
    buckets = _PART_BUCKETS[part]
    seen: set[str] = set()
    found: list[dict[str, str]] = []
    for intent, site in _labels(part, draw):
        if len(found) == size:
            break
        while True:
            details = {name: draw.pick(values) for name, values in _DETAILS.items()}
            text = _fill(_message(intent, draw), details)
            if (
                MIN_WORDS <= len(text.split()) <= MAX_WORDS
                and zlib.crc32(text.encode()) % _BUCKETS in buckets
                and text not in seen
            ):
                break
        seen.add(text)
        reply = _fill(_reply(intent, part, draw), details)
        found.append({"text": text, "intent": intent, "site": site, "reply": reply})
    return tuple(found)
