//! What is said of many values by one.

/// The middle value, or the mean of the two middle ones; NaN, which meets no budget, of nothing.
pub fn median(values: impl Iterator<Item = f64>) -> f64 {
    let values = sorted(values);
    match values.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => values[count / 2],
        count => f64::midpoint(values[count / 2 - 1], values[count / 2]),
    }
}

/// The smallest value that at least `percent` of all do not exceed (nearest rank): of 50 values the 99th percentile is
/// the largest. NaN, which meets no budget, of nothing.
pub fn percentile(percent: u32, values: impl Iterator<Item = f64>) -> f64 {
    let values = sorted(values);
    let rank = (values.len() * percent as usize).div_ceil(100).max(1);
    values.get(rank - 1).copied().unwrap_or(f64::NAN)
}

/// Between what the middle half of the values lie (nearest rank).
pub fn middle_half(values: impl Iterator<Item = f64> + Clone) -> [f64; 2] {
    [percentile(25, values.clone()), percentile(75, values)]
}

pub fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_ignores_order_and_outliers() {
        assert_eq!(median([3.0, 1.0, 100.0].into_iter()), 3.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), 2.5);
        assert!(median([].into_iter()).is_nan());
    }

    #[test]
    fn the_middle_half_has_a_quarter_of_the_values_on_each_side() {
        let values = [8.0, 1.0, 7.0, 2.0, 6.0, 3.0, 5.0, 4.0];
        assert_eq!(middle_half(values.into_iter()), [2.0, 6.0]);
        assert_eq!(middle_half([3.0].into_iter()), [3.0, 3.0]);
    }

    #[test]
    fn a_percentile_is_one_of_the_values_and_bounds_its_share_of_them() {
        for count in 1..=210_u32 {
            // A permutation of 0 to count - 1 that is not sorted: 211 is prime and larger than any count.
            let values = || (0..count).map(|i| f64::from(i * 211 % count));
            for percent in [1, 50, 99, 100] {
                let found = percentile(percent, values());
                let share = |limit: f64| values().filter(|value| *value <= limit).count() as u32 * 100;
                assert!(values().any(|value| value == found));
                assert!(share(found) >= percent * count, "{percent} of {count}");
                assert!(share(found - 1.0) < percent * count, "{percent} of {count}");
            }
        }
    }

    #[test]
    fn the_99th_percentile_of_fifty_is_the_worst() {
        assert_eq!(percentile(99, (1..=50).map(f64::from)), 50.0);
        assert_eq!(percentile(99, (1..=200).map(f64::from)), 198.0);
        assert!(percentile(99, [].into_iter()).is_nan());
    }
}
