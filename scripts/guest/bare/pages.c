#include "pages.h"

#include "machine.h"

enum { CORRUPT_LINES = 16 };

static const char pattern[] = "DDZDDD.DDZDD.DZDDD.Z";
enum { PATTERN_PAGES = (sizeof pattern - 1) * CLUSTER_PAGES };

extern char image_end[];

struct memory memory;

/* Twice a page: a body begins anywhere in the first half. */
static uint32_t body_words[2 * PAGE_WORDS];
static uint32_t random_state = 2463534242u;

/* Marsaglia's xorshift of 32 bits. */
static uint32_t next_random(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    random_state ^= random_state << 5;
    return random_state;
}

static uint32_t random_below(uint32_t limit)
{
    return (uint32_t)((uint64_t)next_random() * limit >> 32);
}

/* --- whole stretches of words, one instruction each -------------------------------------- */

static void copy_words(uint32_t *to, const uint32_t *from, uint32_t count)
{
    __asm__ volatile("rep movsl" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
}

static void clear_words(uint32_t *to, uint32_t count)
{
    __asm__ volatile("rep stosl" : "+D"(to), "+c"(count) : "a"(0) : "memory");
}

/* `count` is not 0, here and below: the instruction would leave the flag as it was. */
static int words_equal(const uint32_t *one, const uint32_t *other, uint32_t count)
{
    int equal;
    __asm__ volatile("repe cmpsl"
                     : "+D"(one), "+S"(other), "+c"(count), "=@cce"(equal)
                     :
                     : "memory");
    return equal;
}

static int words_are_zero(const uint32_t *words, uint32_t count)
{
    int zero;
    __asm__ volatile("repe scasl" : "+D"(words), "+c"(count), "=@cce"(zero) : "a"(0) : "memory");
    return zero;
}

/* --- pages ------------------------------------------------------------------------------- */

static char kind_of(uint32_t page)
{
    return pattern[(page - memory.first_page) / CLUSTER_PAGES % (sizeof pattern - 1)];
}

static uint32_t *words_of(uint32_t page)
{
    return (uint32_t *)(page * PAGE_BYTES);
}

static uint32_t *generation_of(uint32_t page)
{
    return memory.generation + (page - memory.first_page);
}

static const uint32_t *body_of(uint32_t page)
{
    return body_words + page % PAGE_WORDS;
}

/* A permutation of 32 bits (Wellons's lowbias32), so that no two of a page's seals are equal. */
static uint32_t seal(uint32_t page, uint32_t generation)
{
    uint32_t value = page * 0x9E3779B9u + generation;
    value = (value ^ (value >> 16)) * 0x7FEB352Du;
    value = (value ^ (value >> 15)) * 0x846CA68Bu;
    return value ^ (value >> 16);
}

static void write_seals(uint32_t *words, uint32_t value)
{
    words[0] = value;
    words[MIDDLE_WORD] = value + MIDDLE_WORD;
    words[LAST_WORD] = value + LAST_WORD;
}

static int seals_are_right(const uint32_t *words, uint32_t value)
{
    return words[0] == value && words[MIDDLE_WORD] == value + MIDDLE_WORD &&
           words[LAST_WORD] == value + LAST_WORD;
}

static int body_is_right(uint32_t page)
{
    const uint32_t *words = words_of(page), *body = body_of(page), middle = MIDDLE_WORD + 1;
    return words_equal(words + 1, body + 1, MIDDLE_WORD - 1) &&
           words_equal(words + middle, body + middle, LAST_WORD - middle);
}

static void fill_data_page(uint32_t page)
{
    copy_words(words_of(page), body_of(page), PAGE_WORDS);
    write_seals(words_of(page), seal(page, *generation_of(page)));
}

/* Counts the page once: it is said, and then mended. */
static void found_corrupt(uint32_t page, const char *why)
{
    if (memory.corrupt++ < CORRUPT_LINES)
        say_line("@c", (const uint64_t[]){page}, 1, why);
}

static void check_zero_page(uint32_t page)
{
    if (words_are_zero(words_of(page), PAGE_WORDS))
        return;
    found_corrupt(page, "zero");
    clear_words(words_of(page), PAGE_WORDS);
}

static void check_data_page(uint32_t page)
{
    const char *why = 0;
    if (!seals_are_right(words_of(page), seal(page, *generation_of(page))))
        why = "generation";
    else if (!body_is_right(page))
        why = "body";
    if (why) {
        found_corrupt(page, why);
        fill_data_page(page);
    }
}

static void touch_data_page(uint32_t page, int write)
{
    uint32_t *words = words_of(page), *generation = generation_of(page);
    uint32_t value = seal(page, *generation);
    if (!seals_are_right(words, value))
        check_data_page(page);
    if (!write)
        return;
    uint32_t next = seal(page, ++*generation);
    memory.generation_sum += next - value;
    write_seals(words, next);
}

static void touch_zero_page(uint32_t page)
{
    const uint32_t *words = words_of(page);
    if (words[0] | words[MIDDLE_WORD] | words[LAST_WORD])
        check_zero_page(page);
}

void touch_any(void)
{
    uint32_t page;
    do
        page = memory.first_page + random_below(memory.end_page - memory.first_page);
    while (kind_of(page) == '.');
    if (kind_of(page) == 'D')
        touch_data_page(page, next_random() & 1);
    else
        touch_zero_page(page);
}

/* --- memory ------------------------------------------------------------------------------ */

/* The table lies behind the image, the pages behind the table. */
static void plan_memory(uint32_t end)
{
    uint32_t page = ((uint32_t)image_end + PAGE_BYTES - 1) / PAGE_BYTES;
    uint32_t pages = end / PAGE_BYTES - page;
    memory.generation = words_of(page);
    memory.first_page = page + pages / PAGE_WORDS + 1;
    pages = (end / PAGE_BYTES - memory.first_page) / PATTERN_PAGES * PATTERN_PAGES;
    memory.end_page = memory.first_page + pages;
    memory.total_pages = end / PAGE_BYTES;
    clear_words(memory.generation, pages);
}

void fill_memory(uint32_t end)
{
    for (uint32_t word = 0; word < 2 * PAGE_WORDS; word++)
        body_words[word] = next_random();
    plan_memory(end);
    for (uint32_t page = memory.first_page; page < memory.end_page; page++) {
        if (kind_of(page) == 'D') {
            fill_data_page(page);
            memory.generation_sum += seal(page, 0);
            memory.data_pages++;
        } else if (kind_of(page) == 'Z') {
            clear_words(words_of(page), PAGE_WORDS); /* the firmware was here */
            memory.zero_pages++;
        }
    }
}

void check_all_pages(void (*breathe)(void))
{
    uint32_t sum = 0;
    for (uint32_t page = memory.first_page; page < memory.end_page; page++) {
        if (kind_of(page) == 'D') {
            check_data_page(page);
            sum += seal(page, *generation_of(page));
        } else if (kind_of(page) == 'Z') {
            check_zero_page(page);
        }
        breathe();
    }
    if (sum != memory.generation_sum)
        found_corrupt(0, "generation-table");
}
