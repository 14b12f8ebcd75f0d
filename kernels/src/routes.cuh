// Which experts the tokens of a step go through, as products of experts read it.
#pragma once
#include <stdint.h>

// An expert that has tokens.
struct ExpertSlot {
    uint32_t expert;
    uint32_t first, count; // its pairs in the list
    uint32_t unused;
};

struct Routes {
    const ExpertSlot* slots; // of the first, `count` is how many follow: experts with tokens, ascending
    const uint32_t* pairs;   // [tokens · n_used], by expert and then ascending: token · n_used + place among the token's experts

    // The expert of a slot, if there are so many.
    __device__ __forceinline__ bool take(uint32_t slot, ExpertSlot& found) const {
        if (slot >= slots[0].count) return false;
        found = slots[1 + slot];
        return true;
    }
};
