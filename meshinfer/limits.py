"""Every bound of the runtime in one place, with the relations between them asserted."""

from __future__ import annotations

from typing import Final

MIB: Final = 1 << 20

# Wire (RELIABILITY: frames <= 1 MiB, MAXMSGSIZE is per frame, so frames are capped as well).
FRAME_BYTES: Final = 1 * MIB
FRAMES_PER_MESSAGE: Final = 1024
MESSAGE_BYTES: Final = FRAME_BYTES * (FRAMES_PER_MESSAGE - 1)
CONTROL_FRAME_BYTES: Final = 4 * MIB
BLOB_CHUNK_BYTES: Final = 8 * MIB
BLOB_WANT_BYTES: Final = 1 * MIB
BLOB_GONE_TIMES: Final = 3  # a blob is lost when its peer says so often that it has it not
HIGH_WATER_MARK: Final = 32
TENSOR_RANK: Final = 16
BACKLOG_BYTES: Final = 64 * MIB
CREDIT_BYTES: Final = 32 * MIB
"""Under way to one peer and not acknowledged; one message may be larger."""
DRAIN_MESSAGES: Final = 256
DRAIN_BYTES: Final = 64 * MIB

# Liveness.
HEARTBEAT_S: Final = 0.5
BEAT_OFF_S: Final = 0.02
STALL_S: Final = 1.0
DEAD_AFTER_S: Final = 2.0
SILENT_MOST_S: Final = 6.0
"""Without a heartbeat, where others run all that it has: a freeze or a short cut costs no plan."""
HELLO_RETRY_S: Final = 1.0
ACK_TIMEOUT_S: Final = 3.0
ACK_TRIES: Final = 5
ACK_DELAY_S: Final = 1.0
ACKS_AT_ONCE: Final = 64
ACK_BYTES: Final = 1 * MIB
RESEND_AFTER_LOSS_S: Final = 0.2
LINK_ECHOES: Final = 6
LINK_BYTES: Final = (256 << 10, 256 << 10, 256 << 10, 1 << 20, 1 << 20, 1 << 20)
LINK_LONG_S: Final = 0.05
LINK_MEASURE_S: Final = 3.0
LINK_ASKED_S: Final = 5.0
LINK_AGE_S: Final = 60.0  # until measured again; sooner at first: after LINK_YOUNG_S, doubling
LINK_YOUNG_S: Final = 2.0
LINK_DOUBLINGS: Final = 16
LINK_LATENCY_S: Final = 0.002
"""By how much a latency must differ to be planned for, beside LINK_DEVIATION."""
LINK_SAMPLE_BYTES: Final = 64 << 10
LINK_SAMPLE_S: Final = 0.5
LINK_SAMPLES: Final = 4
LINK_SLACK_S: Final = 0.015
"""Of the time of a real transfer so much may be its processors': a quota makes them late."""
LINK_DEVIATION: Final = 1.5  # from what is known of it, to be measured again, or planned for
LINK_DOUBT_S: Final = 5.0
LINKED_DEVICES: Final = 12
"""Up to so many devices the links of all pairs are measured; of more, those with the head."""
LINK_AGAIN_S: Final = 5.0
"""From one link that is measured anew to the next, where there are more links than that: of a
thousand with the head each minute, at 4 MB each, the head's own link would have no end of it."""
SLOWEST_LINK_BYTES_PER_S: Final = 250_000
PULLS_AT_ONCE: Final = 4
GENTLE_PAUSE_TIMES: Final = 9.0
SPARE_PAUSE_TIMES: Final = 4.0
"""What nobody waits for is fetched for a tenth, prepared for a fifth of the time of requests."""
SPARE_SLOT_S: Final = 0.5  # so long in a row, from when an attempt begins that is one in so many:
SPARE_EVERY: Final = 4  # the same for all devices, which are not to make others wait in turn;
SPARE_TURN_S: Final = 2.0  # or so long after the pause, where none begins
COORDINATOR_SILENT_S: Final = 10.0
NO_WORKER_GRACE_S: Final = 5.0
REPLAN_SETTLE_S: Final = 0.2
EXCLUDED_S: Final = 15.0
REFUSED_DOUBLINGS: Final = 5  # of that, while a client and a device do not reach each other
DETOUR_ASKED_S: Final = 5.0
DETOUR_PROBE_S: Final = 1.0
"""How often two devices whose pieces go by the head try to reach each other."""
STRIKES: Final = 3
STRIKES_WITHIN_S: Final = 60.0
EARLY_DEATH_S: Final = 5.0
QUARANTINE_S: Final = 15.0
QUARANTINE_MOST_S: Final = 600.0
QUARANTINE_FORGOTTEN_S: Final = 600.0
REST_S: Final = 1.0
RESTS: Final = 3
"""Killed again and again as it joins, a device rests for 1, then 2 s; 4 s kept it out too long."""
NEVER_QUARANTINED: Final = 2  # so many devices work, whatever they did
LOST_SHOWN_S: Final = 600.0

# Results that may be wrong: tasks that are computed a second time, by another device.
CHECK_SHARE: Final = 0.01
CHECK_SHARE_NEW: Final = 0.20
CHECK_NEW_TASKS: Final = 100
"""Of so many tasks of a device the larger share is checked; while it is in doubt, as many as are
checked at once."""
CHECKS_AT_ONCE: Final = 2
CHECKS_HELD: Final = 4
CHECK_S: Final = 5.0  # one that takes longer is given up: what it needs was not kept, or is gone
CHECK_IDLE_S: Final = 1.0  # so long the device that checks waits to have nothing else to do
CHECK_ERROR: Final = 1e-5
"""Of the largest value, between devices of one numeric class, whose bits are the same."""
CHECK_ERROR_MIXED: Final = 1e-4
CHECK_SPREAD_MIXED: Final = 0.05
"""Of the 2-norm, between devices of two classes: those may round a few values to other steps of a
quantisation, and that is no lie. What lies between both bounds is not judged."""
CHECK_LEAST: Final = 1e-3
"""Results are held against at least so much of the largest input: what cancels leaves noise."""
CHECKS_UNDECIDED: Final = 10
"""After so many between the same two devices one of them works no more: there may be no third that
can tell which of them is wrong."""
DOUBT_CHECKS: Final = 100
"""A device is in doubt for so many checks after one that failed."""
LIAR_S: Final = 3600.0

INSTALL_ATTEMPTS: Final = 3  # in vain on as many devices, and it is the model's fault
INSTALL_S: Final = 600.0
SPARES_AFTER_S: Final = 0.2
"""Once a deployment serves, before tasks are prepared for the loss of a device: requests first."""
SPARES_ROOM: Final = 0.8
"""The part of a device's memory up to which it prepares tasks of others, where the plan's own may
fill it: a model takes more while it is prepared than after, and none is worth a worker's end."""
SPARES_WAIT_S: Final = 2.0  # so long an older plan, which bears a loss, goes before a newer one
TIMING_GRACE_S: Final = 0.25
DRAIN_S: Final = 10.0
TCP_MAX_RETRANSMIT_MS: Final = 3000
KEEPALIVE_IDLE_S: Final = 30
HANDSHAKE_MS: Final = 1000
RECONNECT_MS: Final = 100
RECONNECT_MAX_MS: Final = 200
"""A coordinator that is started again is asked so soon; it takes 50 us a time to find none."""
CONNECT_MS: Final = 500

# Joining: names and key files, and how much of what mDNS says is looked at.
CLUSTER_NAME_CHARS: Final = 32
KEY_FILE_BYTES: Final = 4096
ADMITTED_KEYS: Final = 1024
WAITING_KEYS: Final = 64
TOKENS: Final = 256
TOKEN_CHARS: Final = 1024
TOKEN_S: Final = 15 * 60.0
JOIN_AGAIN_S: Final = 2.0
"""How often one that waits for approval asks again."""
JOIN_FRAME_BYTES: Final = 4096
JOIN_FRAMES: Final = 2
JOIN_CONNECTIONS: Final = 2 * WAITING_KEYS
"""Of strangers to the join socket; one more, and the oldest ends."""
JOIN_CONNECTIONS_PER_HOST: Final = WAITING_KEYS
JOIN_HANDSHAKES: Final = 128
JOIN_HANDSHAKES_PER_S: Final = 32.0
JOIN_MESSAGES: Final = 128
JOIN_MESSAGES_PER_S: Final = 64.0
"""Of all strangers together."""
HANDSHAKES_AT_ONCE: Final = 256
"""Connections to one work socket that have not said who they are; one more, the oldest ends."""
GATE_TRIED_S: Final = 2.0  # how long a port may take to turn a stranger away, as it starts
GREETING_S: Final = 1.0
ROUTES_KEPT: Final = 4096
ROUTES_GONE: Final = 64
"""Of those whose connection is over: so many may come back by it and are known."""
RETIRED_KEPT: Final = 8
WAITS_S: Final = 5 * JOIN_AGAIN_S  # who has not asked again for so long waits no more
ID_CHARS_LEAST: Final = 4
"""Of an id, to say whom one means."""
DEVICE_NAME_CHARS: Final = 64
ADMIN_CALLS_KEPT: Final = 64
"""Answers to admins that are told again, should their connections have broken."""

DISCOVERED: Final = 64
DISCOVERY_TXT_BYTES: Final = 512
DISK_LOW_BYTES: Final = 512 * MIB  # with less free, ``meshinfer doctor`` warns

# Requests.
QUEUE_REQUESTS: Final = 256
QUEUE_BYTES: Final = 256 * MIB
"""Of inputs of open requests that lie with the head; one request may have more, if it is alone."""
QUEUE_SHARE: Final = 0.25
"""Of what the coordinator's host grants: more than that in inputs never fits."""
PACE_ANSWERS: Final = 32
RETRY_AFTER_S: Final = 1.0
RETRY_AFTER_LEAST_S: Final = 0.05
RETRY_AFTER_MOST_S: Final = 30.0

CAUSES_KEPT: Final = 2 * QUEUE_REQUESTS
"""Of so many requests the faults that they met are known: those open, and as many cancelled."""
MAP_AHEAD: Final = 4
ATTEMPTS_PER_REQUEST: Final = 20
RUNNING_REQUESTS: Final = 4
WINDOW: Final = 128
COPIES: Final = 2
COPIES_SHARE: Final = 0.10
COPIES_WINDOW: Final = 1000
LATE_SAMPLES: Final = 64
LATE_TIMES: Final = 3.0
LATE_S: Final = 0.05
SUSPECT_S: Final = 0.25
USUAL_KEPT: Final = 1024
DOUBT_TIMES: Final = 2.0
DOUBT_FIRST_S: Final = 0.5
DOUBT_AGAIN_S: Final = 0.1
BEAT_NOW_S: Final = 0.001
HUNG_S: Final = 5.0
"""In one task. Until then it may be the request that is at fault, and it would end another, too."""
SILENT_REST_S: Final = 2.0
SILENT_TIMES: Final = 4.0
SILENT_S: Final = 0.15
"""Without a sign of life, once asked, at most; less where it is known how long answers take."""
KEPT_BYTES: Final = 256 * MIB
PACE_SAMPLES: Final = 8
PACE_SAMPLES_LEAST: Final = 4
PACE_DEVIATION: Final = 1.15
PACE_GRAVE: Final = 1.5
PACE_UPSET: Final = 2.0
PACE_LEFT: Final = 2.5  # others do the tasks of who has become so slow, until the next plan
PACE_SETTLE_S: Final = 3.0  # so long a plan for devices far apart waits for samples to agree,
PACE_SETTLE_MOST_S: Final = 10.0  # and so long any other
PACE_OVERTAKEN: Final = 2  # so often in turn a plan on its way is dropped for new paces
PACE_FORGOTTEN_S: Final = 30.0
PACE_FORGOTTEN_MOST_S: Final = 600.0
PACES_KEPT: Final = 256
TRY_S: Final = 3.0  # between two tries of a device that has no task now, while requests run
TRY_SOON_S: Final = 0.5  # the same while its pace is not known, or becomes another
TRY_SHARE: Final = 0.1  # of the time of a device that has nothing else to do,
TRY_SHARE_SOON: Final = 0.5  # and while its pace is not known, or becomes another
TRY_SPAN_S: Final = 0.2  # two of the periods, 0.1 s, in which the kernel gives out a quota
TRY_LEAST_S: Final = 0.005  # of a shorter task the timing tells little
TRY_VAIN_S: Final = 30.0  # at most, where tries come to nothing; and where there is no answer
RETREAT_TIMES: Final = 1.5  # as long as one device alone, and it does all; judged by so many:
RETREAT_REQUESTS: Final = 4
RETREAT_S: Final = 5.0  # until one goes by the plan, to see; twice as long each time in vain
RETREAT_DOUBLINGS: Final = 4
RETREAT_SPARES_S: Final = 20.0  # at most, until it may do all of a newer plan, too
RETREAT_STALL_S: Final = 1.0  # without an answer, and what is late begins again there
REPLAN_GAIN: Final = 1.10
REPLAN_EVERY_S: Final = 5.0
REPLAN_DOUBLINGS: Final = 5
REPLAN_REQUESTS: Final = 8
"""Requests under a plan before a better one is looked for: what nobody asks gains nothing."""
REPLAN_QUIET_S: Final = 1.0
REPLAN_SHARE: Final = 0.01
REPLAN_SHARE_GRAVE: Final = 0.05
LAYOUTS_KNOWN: Final = 4  # of plans for one graph: with them begins a search for other paces
SEARCH_SHARE: Final = 0.1
"""Of what the coordinator's device is granted of a processor: a search for a better plan takes no
more. So its tasks slow down by less than what counts as drift, and nobody waits for the search."""
SEARCH_SHARE_GRAVE: Final = 0.3
"""The same when a device has become so slow that its tasks still take longer than those there."""
SEARCH_SLICE_S: Final = 0.005  # of work, then a search pauses; the kernel's timers take 4 ms
SEARCH_PAUSE_S: Final = 2.0
"""The longest pause of a search, after one call into C that took long: it is to see what waits."""
PLANNING_NICE: Final = 5
"""Who plans gives way to who computes. Not more, since no process may take it back: at 19 a plan
that a lost device's requests wait for gets one part in 60 of a processor beside a busy program."""
PLANNING_TRIES: Final = 2
"""A process that ended once was killed by somebody; twice, by what it was asked to plan."""
KERNEL_FAILURES_PER_REQUEST: Final = 3
CRASHES_PER_REQUEST: Final = 3
"""Processes that a request may end, the last of them alone on one device."""
CRASHES_TOGETHER: Final = 1
"""After so many it runs alone: of a plan for all devices it would end them all, and the spares."""
EVIDENCE_S: Final = 10.0
"""How long a request that ran alone waits to hear how its device's process ended."""
POISON_S: Final = 600.0
POISON_BODIES: Final = 256
REASONS: Final = 16
ORPHAN_INPUT_S: Final = 600.0
AHEAD_BYTES_EACH: Final = CREDIT_BYTES
"""Of one sender, of attempts that the coordinator has not told of (yet): they are not acknowledged,
so that an honest one has no more under way."""
AHEAD_BYTES: Final = 4 * AHEAD_BYTES_EACH
AHEAD_SHARE: Final = 0.25
"""Of what a device is granted: no more waits there, of pieces and samples together; and no more of
one sender than half of that."""
AHEAD_EACH: Final = 1024
AHEAD: Final = 4 * AHEAD_EACH
AHEAD_S: Final = 15.0
"""Word of an attempt comes about when its pieces do; those that wait for longer are sent again."""
REQUEST_DEADLINE_S: Final = 300.0
SHAPES_PER_MODEL: Final = 8
EXITS_PER_MODEL: Final = 8
OUTPUTS_ASKED: Final = 1024
VERSIONS_PER_MODEL: Final = 4
MODELS: Final = 64
OPEN_DEPLOYS: Final = 16
PLANS_AT_ONCE: Final = 4
UNASKED_S: Final = 10.0  # then a model has time, and waits for its turn to be planned;
TURN_S: Final = 30.0  # but for what another's plan takes to be prepared not for longer
ANSWERED_IDS_KEPT: Final = 1024
TASK_TIMES_KEPT: Final = 4096  # of their tasks, at 250 bytes: who asks again does so within seconds
FED_REQUESTS: Final = 4 * QUEUE_REQUESTS
"""Whose inputs a head holds of one client: as many as may be open, and more that came with them and
are refused; twice that of all."""
STALE_REQUESTS_KEPT: Final = 1024
GIVEN_UP_KEPT: Final = QUEUE_REQUESTS  # by a client, of which it tells a coordinator again

# The coordinator's journal.
JOURNALED_IDS: Final = 8192
"""Ids of which the body is known, also after a restart; about 300 bytes each, and as many again."""
JOURNALED_PLANS: Final = 64
RESUME_WAIT_S: Final = 2.0
"""So long a coordinator that was started again waits for a plan's devices: they reconnect soon."""
JOURNAL_DELAY_S: Final = 0.5  # so long an outcome waits for an acceptance to be written with
JOURNAL_RETRY_S: Final = 1.0
JOURNAL_WAL_PAGES: Final = 1000
JOURNAL_CACHE_BYTES: Final = 256 << 10
JOURNAL_PAGE_BYTES: Final = 1024
"""A commit writes whole pages, and a memory card wears by them."""

# Sizes.
MODEL_BYTES: Final = 16 << 30
MODEL_FILE_BYTES: Final = (
    1 << 31
) - 1  # a protobuf cannot be larger; its weights may lie beside it
WEIGHT_FILE_BYTES: Final = 64 << 10
WEIGHT_FILES: Final = 16384
DEPLOYING_BYTES: Final = 2 * MODEL_BYTES
BLOB_STORE_BYTES: Final = 8 << 30
BLOBS_VERIFIED: Final = 4096  # at 430 bytes; others are hashed again when they are used
TENSOR_BYTES: Final = MESSAGE_BYTES
GRAPH_CACHE_BYTES: Final = 1 << 30
PLAN_TEXT_BYTES: Final = 2 * MIB
INSTALL_BYTES: Final = 3 * MIB
PLAN_TASKS: Final = 1 << 16
LISTED_PLANS_BYTES: Final = 1 * MIB
REPORT_LINE_CHARS: Final = 300
REPORT_ENTRIES: Final = 256
REPORT_NODES: Final = 4
NAME_CHARS: Final = 512
LABEL_CHARS: Final = 4 * NAME_CHARS
"""What has names in it: a peer, what computes, a release."""
LISTED: Final = 1 << 16
"""Entries of a list in a message, where nothing else bounds it. Decoded, a header takes up to 28
times its bytes (a tuple of two small numbers takes three on the wire)."""
CAUSE_CHARS: Final = 512
FAILURE_CHARS: Final = 16384
IMAGE_PIXELS: Final = 100_000_000
IMAGE_SIDE: Final = 65_535
IMAGE_SCANS: Final = 100
"""Of a progressive JPEG, each of which goes over all pixels in a few bytes; ten are usual."""
IMAGE_FILE_BYTES: Final = 256 * MIB
DEVICES: Final = 1024
PINS: Final = 256
OPERATOR_KINDS: Final = 64

# Memory of a device.
WORKER_BYTES: Final = 176 * MIB
"""Of what a worker is granted so much is not for shares of models: it takes 60 MB idle, with its
supervisor, and 166 MB as it measures; upscaling 451 x 300 pixels 134 to 185 MB beside its share,
for what a kernel works in, what is received and what waits to be sent are in no plan."""

# Importing. Weights come on top of the memory; a value that is folded from constants is a weight.
SUBGRAPH_DEPTH: Final = 32
WINDOW_ELEMENTS: Final = 1 << 26
FOLDED_BYTES: Final = 256 * MIB
IMPORT_BYTES: Final = 2 << 30
IMPORT_COPIES: Final = 3
IMPORT_S: Final = 60.0
IMPORT_BYTES_PER_S: Final = 25_000_000

# What is measured of a deployment whose transfers are rounded, by running its plan twice.
LOSS_FLOPS: Final = 40_000_000_000
"""Of one run: VGG-16 at 224 (31e9) is within, and its deployment took no longer by it."""
LOSS_BYTES: Final = 1 << 30
"""Weights and values of all tasks; no more than the coordinator's device has free, either."""

# The virtual lab.
LAB_DEVICES: Final = 64
LAB_CORES: Final = (0.01, 64.0)
LAB_MEMORY_BYTES: Final = (16 * MIB, 1 << 40)
LAB_LINK_BITS_PER_S: Final = (1e5, 1e10)

assert BLOB_CHUNK_BYTES <= FRAME_BYTES * FRAMES_PER_MESSAGE
assert LINK_MEASURE_S < LINK_ASKED_S
assert LINK_AGAIN_S * LINKED_DEVICES <= LINK_AGE_S
assert HEARTBEAT_S * 3 <= DEAD_AFTER_S < SILENT_MOST_S
assert ACK_DELAY_S * 3 <= ACK_TIMEOUT_S
assert PACE_SAMPLES <= LATE_SAMPLES
assert TRY_SOON_S < TRY_S < PACE_FORGOTTEN_S  # or it would count as forgotten between two
assert SUSPECT_S < DEAD_AFTER_S
assert QUARANTINE_S < STRIKES_WITHIN_S  # or each quarantine would begin the count anew
assert HEARTBEAT_S < STALL_S < DEAD_AFTER_S
assert PACE_SAMPLES_LEAST <= PACE_SAMPLES
assert 1.0 < PACE_DEVIATION < PACE_GRAVE < PACE_UPSET
assert 1.0 / (1.0 - SEARCH_SHARE) < PACE_DEVIATION
assert SEARCH_SHARE < SEARCH_SHARE_GRAVE and 1.0 / (1.0 - SEARCH_SHARE_GRAVE) < PACE_GRAVE
assert CRASHES_TOGETHER < CRASHES_PER_REQUEST
assert CRASHES_PER_REQUEST < ATTEMPTS_PER_REQUEST
assert ACK_TIMEOUT_S < AHEAD_S < ORPHAN_INPUT_S
assert CREDIT_BYTES <= BACKLOG_BYTES  # else a full pipe would drop what has credit
assert ACK_BYTES * 4 <= CREDIT_BYTES  # or the sender would wait for acknowledgements
assert RETRY_AFTER_LEAST_S < RETRY_AFTER_S < RETRY_AFTER_MOST_S
assert RUNNING_REQUESTS <= WINDOW <= QUEUE_REQUESTS
assert QUEUE_REQUESTS + ANSWERED_IDS_KEPT < JOURNALED_IDS
assert (RECONNECT_MAX_MS + RECONNECT_MS) * 4 <= RESUME_WAIT_S * 1000  # libzmq adds up to the least
assert PLAN_TEXT_BYTES <= CONTROL_FRAME_BYTES
assert PLAN_TASKS <= LISTED
assert FAILURE_CHARS * 4 < PLAN_TEXT_BYTES  # it fits into a Failure, whatever its characters are
assert BLOB_CHUNK_BYTES < BACKLOG_BYTES
assert BLOB_WANT_BYTES <= BLOB_CHUNK_BYTES
assert LISTED_PLANS_BYTES < CONTROL_FRAME_BYTES
assert WEIGHT_FILES * 128 < CONTROL_FRAME_BYTES  # their names travel in one message
assert FOLDED_BYTES * 4 <= IMPORT_BYTES
