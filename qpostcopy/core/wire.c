#include "wire.h"

#include <endian.h>
#include <string.h>

static const uint8_t MAGIC[8] = {'Q', 'P', 'C', 'L', 'A', 'N', 'E', '\n'};

/* --- a cursor that cannot leave its buffer ------------------------------------------------- */

struct reader {
    const uint8_t *at;
    size_t left;
    bool short_read;
};

static void take(struct reader *reader, void *out, size_t length)
{
    if (reader->left < length) {
        reader->short_read = true;
        reader->left = 0;
        memset(out, 0, length);
        return;
    }
    memcpy(out, reader->at, length);
    reader->at += length;
    reader->left -= length;
}

static uint8_t take8(struct reader *reader)
{
    uint8_t value;
    take(reader, &value, sizeof value);
    return value;
}

static uint16_t take16(struct reader *reader)
{
    uint16_t value;
    take(reader, &value, sizeof value);
    return le16toh(value);
}

static uint32_t take32(struct reader *reader)
{
    uint32_t value;
    take(reader, &value, sizeof value);
    return le32toh(value);
}

static uint64_t take64(struct reader *reader)
{
    uint64_t value;
    take(reader, &value, sizeof value);
    return le64toh(value);
}

static uint8_t *put(uint8_t *at, const void *bytes, size_t length)
{
    memcpy(at, bytes, length);
    return at + length;
}

static uint8_t *put16(uint8_t *at, uint16_t value)
{
    value = htole16(value);
    return put(at, &value, sizeof value);
}

static uint8_t *put32(uint8_t *at, uint32_t value)
{
    value = htole32(value);
    return put(at, &value, sizeof value);
}

static uint8_t *put64(uint8_t *at, uint64_t value)
{
    value = htole64(value);
    return put(at, &value, sizeof value);
}

static int bad(struct qpc_error *error, const char *what, uint64_t value)
{
    return qpc_fail(error, QPC_PROTOCOL, 0, what, value, 0);
}

/* --- frames -------------------------------------------------------------------------------- */

void qpc_frame_encode(const struct qpc_frame *frame, uint8_t out[24])
{
    *out++ = frame->type;
    *out++ = 0; /* flags: none are defined */
    out = put16(out, frame->block);
    out = put32(out, frame->focus);
    out = put64(out, frame->first_page);
    put64(out, frame->page_count);
}

static bool is_bare(const struct qpc_frame *frame)
{
    return !frame->block && !frame->focus && !frame->first_page && !frame->page_count;
}

int qpc_frame_decode(const uint8_t in[24], const uint64_t *block_pages, unsigned block_count,
                     struct qpc_frame *frame, struct qpc_error *error)
{
    struct reader reader = {in, QPC_FRAME_BYTES, false};
    frame->type = take8(&reader);
    uint8_t flags = take8(&reader);
    frame->block = take16(&reader);
    frame->focus = take32(&reader);
    frame->first_page = take64(&reader);
    frame->page_count = take64(&reader);

    if (frame->type == 0 || frame->type >= QPC_FRAME_TYPES)
        return bad(error, "frame: unknown type", frame->type);
    if (flags)
        return bad(error, "frame: unknown flags", flags);
    if (frame->type == QPC_FRAME_START || frame->type == QPC_FRAME_END)
        return is_bare(frame) ? QPC_OK : bad(error, "frame: START or END with an extent", frame->type);
    if (frame->block >= block_count)
        return bad(error, "frame: unknown block", frame->block);
    if (frame->page_count == 0)
        return bad(error, "frame: empty extent", 0);
    uint64_t pages = block_pages[frame->block];
    if (frame->first_page >= pages || frame->page_count > pages - frame->first_page)
        return bad(error, "frame: extent outside its block", frame->first_page);
    if (frame->type == QPC_FRAME_DATA && frame->page_count > QPC_FRAME_PAGES_MAX)
        return bad(error, "frame: payload too long", frame->page_count);
    if (frame->type == QPC_FRAME_REQUEST ? frame->focus >= frame->page_count : frame->focus != 0)
        return bad(error, "frame: focus outside its extent", frame->focus);
    return QPC_OK;
}

/* --- hello --------------------------------------------------------------------------------- */

size_t qpc_hello_encode(const struct qpc_hello *hello, uint8_t *out)
{
    uint8_t *at = out + QPC_HELLO_HEADER_BYTES;
    *at++ = hello->status;
    *at++ = hello->lane_kind;
    at = put16(at, hello->lane_index);
    at = put32(at, hello->page_bytes);
    at = put64(at, hello->features);
    at = put(at, hello->migration_id, QPC_ID_BYTES);
    at = put(at, hello->token, QPC_TOKEN_BYTES);
    at = put16(at, hello->block_count);
    for (unsigned i = 0; i < hello->block_count; i++) {
        uint16_t length = (uint16_t)strnlen(hello->blocks[i].name, QPC_NAME_BYTES - 1);
        at = put64(at, hello->blocks[i].size_bytes);
        at = put16(at, length);
        at = put(at, hello->blocks[i].name, length);
    }
    size_t total = (size_t)(at - out);
    at = put(out, MAGIC, sizeof MAGIC);
    at = put16(at, hello->version_lowest);
    at = put16(at, hello->version_highest);
    put32(at, (uint32_t)(total - QPC_HELLO_HEADER_BYTES));
    return total;
}

int qpc_hello_body_bytes(const uint8_t *in, size_t *body_bytes, struct qpc_error *error)
{
    struct reader reader = {in + sizeof MAGIC + 4, 4, false};
    if (memcmp(in, MAGIC, sizeof MAGIC) != 0)
        return bad(error, "hello: this is not a qpostcopy lane", 0);
    uint32_t length = take32(&reader);
    if (length > QPC_HELLO_BODY_MAX)
        return bad(error, "hello: too long", length);
    *body_bytes = length;
    return QPC_OK;
}

static int take_block(struct reader *reader, struct qpc_hello_block *block, struct qpc_error *error)
{
    block->size_bytes = take64(reader);
    uint16_t length = take16(reader);
    if (length == 0 || length >= QPC_NAME_BYTES)
        return bad(error, "hello: length of a block name", length);
    take(reader, block->name, length);
    block->name[length] = 0;
    if (memchr(block->name, 0, length))
        return bad(error, "hello: NUL in a block name", length);
    if (block->size_bytes == 0 || block->size_bytes % QPC_PAGE_BYTES)
        return bad(error, "hello: block size is not whole pages", block->size_bytes);
    return QPC_OK;
}

int qpc_hello_decode(const uint8_t *in, size_t length, struct qpc_hello *hello,
                     struct qpc_error *error)
{
    size_t body_bytes;
    memset(hello, 0, sizeof *hello);
    if (length < QPC_HELLO_HEADER_BYTES)
        return bad(error, "hello: cut short", length);
    int code = qpc_hello_body_bytes(in, &body_bytes, error);
    if (code)
        return code;
    struct reader reader = {in + sizeof MAGIC, length - sizeof MAGIC, false};
    hello->version_lowest = take16(&reader);
    hello->version_highest = take16(&reader);
    take32(&reader);
    if (reader.left != body_bytes)
        return bad(error, "hello: length does not match", body_bytes);
    hello->status = take8(&reader);
    hello->lane_kind = take8(&reader);
    hello->lane_index = take16(&reader);
    hello->page_bytes = take32(&reader);
    hello->features = take64(&reader);
    take(&reader, hello->migration_id, QPC_ID_BYTES);
    take(&reader, hello->token, QPC_TOKEN_BYTES);
    hello->block_count = take16(&reader);
    if (reader.short_read)
        return bad(error, "hello: cut short", length);
    if (hello->version_lowest == 0 || hello->version_lowest > hello->version_highest)
        return bad(error, "hello: versions", hello->version_lowest);
    if (hello->status == 0 || hello->status >= QPC_HELLO_STATUSES)
        return bad(error, "hello: unknown status", hello->status);
    if (hello->lane_kind == 0 || hello->lane_kind >= QPC_LANE_KINDS)
        return bad(error, "hello: unknown lane kind", hello->lane_kind);
    if (hello->lane_kind == QPC_LANE_STATE && hello->version_lowest < QPC_VERSION_STATE)
        return bad(error, "hello: a state lane of a version without", hello->version_lowest);
    if (!memchr(hello->migration_id, 0, QPC_ID_BYTES))
        return bad(error, "hello: migration id without an end", 0);
    if (hello->block_count > QPC_BLOCKS_MAX)
        return bad(error, "hello: too many blocks", hello->block_count);
    for (unsigned i = 0; i < hello->block_count; i++) {
        code = take_block(&reader, &hello->blocks[i], error);
        if (code)
            return code;
    }
    if (reader.short_read)
        return bad(error, "hello: cut short", length);
    /* A newer peer may say more than we understand, an equal one may not. */
    if (reader.left && hello->version_highest <= QPC_VERSION_HIGHEST)
        return bad(error, "hello: bytes left over", reader.left);
    return QPC_OK;
}

unsigned qpc_version_choose(unsigned lowest, unsigned highest, unsigned peer_lowest,
                            unsigned peer_highest)
{
    unsigned version = highest < peer_highest ? highest : peer_highest;
    return version >= lowest && version >= peer_lowest ? version : 0;
}
