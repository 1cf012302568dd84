/* Frames and hellos: what is encoded is decoded, and nothing else is taken. */
#include <string.h>

#include "check.h"
#include "wire.h"

static const uint64_t PAGES[2] = {100, 1ull << 40};

static int decode(struct qpc_frame frame, struct qpc_error *error)
{
    uint8_t bytes[QPC_FRAME_BYTES];
    struct qpc_frame out;
    qpc_frame_encode(&frame, bytes);
    int code = qpc_frame_decode(bytes, PAGES, 2, &out, error);
    if (code == QPC_OK) {
        CHECK(out.type == frame.type && out.block == frame.block && out.focus == frame.focus);
        CHECK(out.first_page == frame.first_page && out.page_count == frame.page_count);
    }
    return code;
}

static void frames_come_back(void)
{
    struct qpc_error error;
    CHECK(!decode((struct qpc_frame){QPC_FRAME_REQUEST, 0, 3, 96, 4}, &error));
    CHECK(!decode((struct qpc_frame){QPC_FRAME_DATA, 1, 0, (1ull << 40) - 64, 64}, &error));
    CHECK(!decode((struct qpc_frame){QPC_FRAME_HOLE, 1, 0, 0, 1ull << 40}, &error));
    CHECK(!decode((struct qpc_frame){.type = QPC_FRAME_START}, &error));
    CHECK(!decode((struct qpc_frame){.type = QPC_FRAME_END}, &error));
}

static void bad_frames_are_refused(void)
{
    const struct qpc_frame bad[] = {
        {.type = 0, .page_count = 1},
        {.type = QPC_FRAME_TYPES, .page_count = 1},
        {QPC_FRAME_ZERO, 2, 0, 0, 1},              /* no such block */
        {QPC_FRAME_ZERO, 0, 0, 0, 0},              /* empty */
        {QPC_FRAME_ZERO, 0, 0, 100, 1},            /* behind the end */
        {QPC_FRAME_ZERO, 0, 0, 99, 2},             /* across the end */
        {QPC_FRAME_ZERO, 0, 0, 1, ~0ull},          /* sum overflows */
        {QPC_FRAME_ZERO, 0, 0, ~0ull, 1},
        {QPC_FRAME_DATA, 0, 0, 0, 65},             /* longer than a frame may be */
        {QPC_FRAME_REQUEST, 0, 4, 0, 4},           /* focus outside */
        {QPC_FRAME_DATA, 0, 1, 0, 4},              /* focus where none belongs */
        {.type = QPC_FRAME_END, .page_count = 1},
        {.type = QPC_FRAME_START, .block = 1},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct qpc_error error = {0};
        CHECK(decode(bad[i], &error) == QPC_PROTOCOL);
        CHECK(error.code == QPC_PROTOCOL && error.operation[0]);
    }
}

static void flags_are_refused(void)
{
    uint8_t bytes[QPC_FRAME_BYTES];
    struct qpc_frame frame = {QPC_FRAME_ZERO, 0, 0, 0, 1}, out;
    struct qpc_error error;
    qpc_frame_encode(&frame, bytes);
    bytes[1] = 1;
    CHECK(qpc_frame_decode(bytes, PAGES, 2, &out, &error) == QPC_PROTOCOL);
}

static void layout_is_fixed(void)
{
    /* A peer of another build reads these very bytes: this test is the specification. */
    const uint8_t expected[QPC_FRAME_BYTES] = {1, 0, 1, 0, 2, 0, 0, 0, 8, 7, 6, 5,
                                               4, 3, 2, 1, 3, 0, 0, 0, 0, 0, 0, 0};
    uint8_t bytes[QPC_FRAME_BYTES];
    struct qpc_frame frame = {QPC_FRAME_REQUEST, 1, 2, 0x0102030405060708, 3};
    qpc_frame_encode(&frame, bytes);
    CHECK(!memcmp(bytes, expected, sizeof expected));
}

static struct qpc_hello sample(void)
{
    struct qpc_hello hello = {.version_lowest = 1,
                              .version_highest = 1,
                              .status = QPC_HELLO_OFFER,
                              .lane_kind = QPC_LANE_PUSH,
                              .lane_index = 7,
                              .page_bytes = QPC_PAGE_BYTES,
                              .features = 5,
                              .migration_id = "web1-20261123T101500",
                              .block_count = 2};
    memset(hello.token, 0xab, sizeof hello.token);
    hello.blocks[0] = (struct qpc_hello_block){1 << 20, "ram0"};
    hello.blocks[1] = (struct qpc_hello_block){1ull << 40, "/objects/ram1"};
    return hello;
}

static void hellos_come_back(void)
{
    static uint8_t bytes[QPC_HELLO_HEADER_BYTES + QPC_HELLO_BODY_MAX];
    struct qpc_hello hello = sample(), out;
    struct qpc_error error;
    size_t length = qpc_hello_encode(&hello, bytes), body;
    CHECK(!qpc_hello_body_bytes(bytes, &body, &error));
    CHECK(body == length - QPC_HELLO_HEADER_BYTES);
    CHECK(!qpc_hello_decode(bytes, length, &out, &error));
    CHECK(!memcmp(&out, &hello, sizeof out));
}

static int decoded(uint8_t lane_kind, uint16_t version_lowest, uint16_t version_highest)
{
    static uint8_t bytes[QPC_HELLO_HEADER_BYTES + QPC_HELLO_BODY_MAX];
    struct qpc_hello hello = sample(), out;
    struct qpc_error error;
    hello.lane_kind = lane_kind;
    hello.version_lowest = version_lowest;
    hello.version_highest = version_highest;
    return qpc_hello_decode(bytes, qpc_hello_encode(&hello, bytes), &out, &error);
}

static void every_kind_of_lane_is_of_its_version(void)
{
    CHECK(decoded(QPC_LANE_DEMAND, 1, 1) == QPC_OK);
    CHECK(decoded(QPC_LANE_PUSH, 1, 2) == QPC_OK);
    CHECK(decoded(QPC_LANE_STATE, 2, 2) == QPC_OK);
    CHECK(decoded(QPC_LANE_STATE, 2, 3) == QPC_OK);
    CHECK(decoded(QPC_LANE_STATE, 1, 2) == QPC_PROTOCOL);
    CHECK(decoded(QPC_LANE_STATE, 1, 1) == QPC_PROTOCOL);
    CHECK(decoded(0, 1, 2) == QPC_PROTOCOL);
    CHECK(decoded(QPC_LANE_KINDS, 1, 2) == QPC_PROTOCOL);
}

static void every_cut_of_a_hello_is_refused(void)
{
    static uint8_t bytes[QPC_HELLO_HEADER_BYTES + QPC_HELLO_BODY_MAX];
    struct qpc_hello hello = sample(), out;
    struct qpc_error error;
    size_t length = qpc_hello_encode(&hello, bytes);
    for (size_t cut = 0; cut < length; cut++) {
        uint8_t *exact = malloc(cut ? cut : 1); /* ASan sees a read beyond it */
        memcpy(exact, bytes, cut);
        CHECK(qpc_hello_decode(exact, cut, &out, &error) == QPC_PROTOCOL);
        free(exact);
    }
}

static void hostile_hellos_do_not_overrun(void)
{
    static uint8_t bytes[QPC_HELLO_HEADER_BYTES + QPC_HELLO_BODY_MAX];
    struct qpc_hello hello = sample(), out;
    struct qpc_error error;
    size_t length = qpc_hello_encode(&hello, bytes);
    unsigned seed = 1;
    for (int round = 0; round < 200000; round++) {
        uint8_t *exact = malloc(length);
        memcpy(exact, bytes, length);
        for (int flips = 0; flips < 3; flips++) {
            seed = seed * 1103515245u + 12345u;
            exact[(seed >> 8) % length] = (uint8_t)(seed >> 20);
        }
        if (qpc_hello_decode(exact, length, &out, &error) == QPC_OK) {
            CHECK(out.block_count <= QPC_BLOCKS_MAX);
            CHECK(memchr(out.migration_id, 0, sizeof out.migration_id));
        }
        free(exact);
    }
}

static void versions_meet(void)
{
    CHECK(qpc_version_choose(1, 1, 1, 1) == 1);
    CHECK(qpc_version_choose(1, 2, 1, 1) == 1); /* N speaks N-1 */
    CHECK(qpc_version_choose(1, 2, 2, 3) == 2);
    CHECK(qpc_version_choose(2, 3, 1, 1) == 0);
    CHECK(qpc_version_choose(1, 1, 2, 3) == 0);
}

int main(void)
{
    RUN(frames_come_back);
    RUN(bad_frames_are_refused);
    RUN(flags_are_refused);
    RUN(layout_is_fixed);
    RUN(hellos_come_back);
    RUN(every_kind_of_lane_is_of_its_version);
    RUN(every_cut_of_a_hello_is_refused);
    RUN(hostile_hellos_do_not_overrun);
    RUN(versions_meet);
    return 0;
}
