// What products of experts are told: a matrix has the rows of all experts, one after the other, and a list of pairs
// names each expert's columns.
#pragma once
#include "routes.cuh"
#include "wide.cuh"

struct Experts {
    Routes routes;
    uint32_t rows;       // of an expert
    uint32_t row_blocks; // that these are
    uint32_t sharing;    // pairs of a token that share a column of activations
    uint32_t unused;
};

// An expert's pair, the column of its activations, and where the rows of the expert begin.
struct ExpertWalk {
    const uint32_t* pairs;
    uint32_t count, sharing, first_row;

    __device__ __forceinline__ ExpertWalk(const Experts& experts, const ExpertSlot& slot)
        : pairs(experts.routes.pairs + slot.first), count(slot.count), sharing(experts.sharing), first_row(slot.expert * experts.rows) {}

    __device__ __forceinline__ uint32_t column(uint32_t index) const { return pairs[index] / sharing; }
};

struct ExpertWideArgs {
    WideArgs product;
    Experts experts;
};
