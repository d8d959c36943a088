#include "check.h"
#include "util/list.h"

struct item {
    int number;
    struct list link;
};

/* The numbers in a list as decimal digits, or -1 when its links do not agree in both directions. */
static int digits(struct list *head) {
    int n = 0;
    for (struct list *l = head->next; l != head; l = l->next) {
        if (l->next->prev != l || l->prev->next != l)
            return -1;
        n = n * 10 + LIST_OWNER(l, struct item, link)->number;
    }
    return head->next->prev == head && head->prev->next == head ? n : -1;
}

static struct list head, other;
static struct item items[10];

static void fill(struct list *l, int from, int to) {
    list_init(l);
    for (int i = from; i <= to; i++) {
        items[i].number = i;
        list_append(l, &items[i].link);
    }
}

static void a_new_list_is_empty(void) {
    list_init(&head);
    CHECK(list_is_empty(&head) && digits(&head) == 0 && !list_pop(&head));
}

static void links_stand_in_the_order_appended(void) {
    fill(&head, 1, 3);
    CHECK(!list_is_empty(&head) && digits(&head) == 123);
}

static void a_link_can_be_removed_anywhere_and_twice(void) {
    fill(&head, 1, 4);
    list_remove(&items[2].link);
    list_remove(&items[2].link);
    CHECK(digits(&head) == 134);
    list_remove(&items[1].link);
    list_remove(&items[4].link);
    CHECK(digits(&head) == 3);
    list_append(&head, &items[2].link);
    CHECK(digits(&head) == 32);
    list_remove(&items[3].link);
    list_remove(&items[2].link);
    CHECK(list_is_empty(&head));
}

static void pop_takes_the_first_until_none_is_left(void) {
    fill(&head, 1, 2);
    CHECK(list_pop(&head) == &items[1].link && list_is_empty(&items[1].link));
    CHECK(digits(&head) == 2);
    CHECK(list_pop(&head) == &items[2].link && !list_pop(&head) && list_is_empty(&head));
}

static void splice_moves_all_to_the_end(void) {
    fill(&head, 1, 2);
    fill(&other, 3, 5);
    list_splice(&head, &other);
    CHECK(digits(&head) == 12345 && list_is_empty(&other));
    list_splice(&head, &other);
    CHECK(digits(&head) == 12345 && list_is_empty(&other));
    list_splice(&other, &head);
    CHECK(digits(&other) == 12345 && list_is_empty(&head));
}

int main(void) {
    a_new_list_is_empty();
    links_stand_in_the_order_appended();
    a_link_can_be_removed_anywhere_and_twice();
    pop_takes_the_first_until_none_is_left();
    splice_moves_all_to_the_end();
    return check_end();
}
